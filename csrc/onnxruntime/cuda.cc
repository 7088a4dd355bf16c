// The library of the kernels for ONNX Runtime's CUDA provider. The host build registers them for the CPU provider.
#include "onnxruntime/cuda.h"

namespace healthgpt {

#ifdef HEALTHGPT_CUDA_HOST
const char* Provider() { return nullptr; }
#else
const char* Provider() { return "CUDAExecutionProvider"; }
#endif

std::vector<const OrtCustomOp*> Operators() {
  return {CudaLinearOperator(), CudaHLoraLinearOperator(), CudaCachedAttentionOperator(cuda::Storage::kFloat16),
          CudaCachedAttentionOperator(cuda::Storage::kInt8)};
}

}  // namespace healthgpt
