#include "cuda/product.h"

#ifdef __CUDACC__
#include <cublasLt.h>
#else
#include "cuda/numbers.cuh"
#endif

namespace healthgpt::cuda {

#ifdef __CUDACC__

namespace {

// A cuBLASLt descriptor that is destroyed with its scope.
template <class Handle, cublasStatus_t (*destroy)(Handle)>
struct Owned {
  Handle handle = nullptr;
  Owned() = default;
  ~Owned() {
    if (handle != nullptr) destroy(handle);
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
};
using Operation = Owned<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>;
using Layout = Owned<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;
using Preference = Owned<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>;

Status Text(cublasStatus_t status) {
  return status == CUBLAS_STATUS_SUCCESS ? nullptr : cublasLtGetStatusString(status);
}

// One handle serves every GPU and thread of the process.
cublasLtHandle_t Library() {
  static cublasLtHandle_t library = [] {
    cublasLtHandle_t made = nullptr;
    return cublasLtCreate(&made) == CUBLAS_STATUS_SUCCESS ? made : nullptr;
  }();
  return library;
}

}  // namespace

// cuBLASLt expects column-major matrices. The same memory read that way is result^T = right^T left^T.
Status LargeProduct(const ProductArguments& given, Stream stream) {
  const cublasLtHandle_t library = Library();
  if (library == nullptr) return "cuBLASLt could not be started";
  const cudaDataType_t type = given.storage == Storage::kFloat16 ? CUDA_R_16F : CUDA_R_16BF;
  const auto rows = static_cast<uint64_t>(given.rows), channels = static_cast<uint64_t>(given.channels);
  const auto outputs = static_cast<uint64_t>(given.outputs);
  Operation operation;
  Layout left, right, result;
  Preference preference;
  const uint64_t bytes = kProductWorkspaceBytes;
  cublasLtMatmulHeuristicResult_t found = {};
  int count = 0;
  Status wrong = Text(cublasLtMatmulDescCreate(&operation.handle, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  if (wrong == nullptr) {
    wrong = Text(cublasLtMatrixLayoutCreate(&right.handle, type, outputs, channels, given.right_stride));
  }
  if (wrong == nullptr) wrong = Text(cublasLtMatrixLayoutCreate(&left.handle, type, channels, rows, given.channels));
  if (wrong == nullptr) {
    wrong = Text(cublasLtMatrixLayoutCreate(&result.handle, CUDA_R_32F, outputs, rows, given.outputs));
  }
  if (wrong == nullptr) wrong = Text(cublasLtMatmulPreferenceCreate(&preference.handle));
  if (wrong == nullptr) {
    wrong = Text(cublasLtMatmulPreferenceSetAttribute(preference.handle, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                      &bytes, sizeof bytes));
  }
  if (wrong == nullptr) {
    wrong = Text(cublasLtMatmulAlgoGetHeuristic(library, operation.handle, right.handle, left.handle, result.handle,
                                                result.handle, preference.handle, 1, &found, &count));
  }
  if (wrong == nullptr && count == 0) wrong = "cuBLASLt has no algorithm for this product";
  if (wrong != nullptr) return wrong;
  const float one = 1.0f, before = given.accumulate ? 1.0f : 0.0f;
  return Text(cublasLtMatmul(library, operation.handle, &one, given.right, right.handle, given.left, left.handle,
                             &before, given.result, result.handle, given.result, result.handle, &found.algo,
                             given.workspace, kProductWorkspaceBytes, stream));
}

#else

namespace {

template <class Number>
void Multiply(const ProductArguments& given) {
  const auto* const left = static_cast<const Number*>(given.left);
  const auto* const right = static_cast<const Number*>(given.right);
  for (int64_t row = 0; row < given.rows; ++row) {
    for (int64_t output = 0; output < given.outputs; ++output) {
      float sum = given.accumulate ? given.result[row * given.outputs + output] : 0.0f;
      for (int64_t channel = 0; channel < given.channels; ++channel) {
        sum += ToFloat(left[row * given.channels + channel]) * ToFloat(right[channel * given.right_stride + output]);
      }
      given.result[row * given.outputs + output] = sum;
    }
  }
}

}  // namespace

Status LargeProduct(const ProductArguments& given, Stream) {
  given.storage == Storage::kFloat16 ? Multiply<Half>(given) : Multiply<BFloat16>(given);
  return nullptr;
}

#endif

}  // namespace healthgpt::cuda
