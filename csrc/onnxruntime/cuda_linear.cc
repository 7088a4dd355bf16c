// The linears on a GPU: few rows by hlora_linear/cuda.h, many by hlora_linear/prefill.h.
#include <algorithm>

#include "hlora_linear/cuda.h"
#include "hlora_linear/prefill.h"
#include "onnxruntime/cuda.h"
#include "onnxruntime/linear_node.h"

namespace healthgpt {
namespace {

// As many as a pass of drafts has at most (runtime/drafting/pace.py): a row of it must have the bits of a plain step.
constexpr int64_t kMostExactRows = 64;

cuda::Storage StorageOf(OrtElementType type) {
  switch (type) {
    case kOrtFloat16:
      return cuda::Storage::kFloat16;
    case kOrtInt8:
      return cuda::Storage::kInt8;
    case kOrtInt4:
      return cuda::Storage::kInt4;
    default:
      throw std::invalid_argument("weights must be float16, int8 or int4 on a GPU, found float32");
  }
}

cuda::Matrix MatrixOf(const MatrixOperand& operand) {
  cuda::Matrix matrix;
  matrix.values = operand.values;
  matrix.scales = operand.scales;
  matrix.storage = StorageOf(operand.type);
  matrix.channels = operand.channels;
  matrix.outputs = matrix.stride = operand.outputs;
  matrix.block_size = operand.block_size;
  return matrix;
}

// A copy of a stored matrix whose rows begin where wide loads may; none where they do already, where rows begin within
// a byte, or where the matrix is only known when the graph runs.
class WideMatrix {
 public:
  WideMatrix(const Attributes& attributes, size_t index) {
    const Tensor values = attributes.Constant(index, kHLoraLinearInputs[index]);
    if (!values.given || values.rank != 2 || values.elements == 0 || values.type == kOrtFloat32) return;
    const cuda::Storage storage = StorageOf(values.type);
    const int64_t bits = storage == cuda::Storage::kInt4 ? 4 : storage == cuda::Storage::kInt8 ? 8 : 16;
    const int64_t stride = cuda::WideStride(storage, values.shape[1]);
    if (stride == values.shape[1] || values.shape[1] * bits % 8 != 0) return;
    const int64_t to_bytes = stride * bits / 8, from_bytes = values.shape[1] * bits / 8;
    memory_ = std::make_unique<cuda::Memory>(values.shape[0] * to_bytes);
    stride_ = stride;
    Raise(cuda::CopyRows(memory_->data(), to_bytes, values.data, from_bytes, from_bytes, values.shape[0]));
  }

  cuda::Matrix Of(const MatrixOperand& operand) const {
    cuda::Matrix matrix = MatrixOf(operand);
    if (memory_ == nullptr) return matrix;
    matrix.values = memory_->data();
    matrix.stride = stride_;
    return matrix;
  }

 private:
  std::unique_ptr<cuda::Memory> memory_;
  int64_t stride_ = 0;
};

class CudaLinear {
 public:
  CudaLinear(const Attributes& attributes, bool has_adapters)
      : workspaces_(Workspaces::Get()), weight_(std::make_unique<WideMatrix>(attributes, 1)) {
    if (!has_adapters) return;
    adapter_in_ = std::make_unique<WideMatrix>(attributes, 4);
    adapter_out_ = std::make_unique<WideMatrix>(attributes, 6);
  }

  void operator()(const LinearOperands& operands, Call& call) const {
    const cuda::Stream stream = StreamOf(call);
    if (operands.rows > kMostExactRows) return Prefill(operands, stream);
    for (int64_t first = 0; first < operands.rows; first += cuda::kMostDecodeRows) {
      auto arguments = Arguments<cuda::HLoraLinearArguments>(operands);
      arguments.rows = std::min(operands.rows - first, cuda::kMostDecodeRows);
      arguments.x += first * operands.weight.channels;
      arguments.y += first * operands.weight.outputs;
      arguments.workspace_bytes = cuda::HLoraLinearWorkspaceBytes(arguments);
      arguments.workspace = workspaces_->Reserve(stream, Workspaces::kDecode, arguments.workspace_bytes);
      Raise(cuda::HLoraLinear(arguments, stream));
    }
  }

 private:
  void Prefill(const LinearOperands& operands, cuda::Stream stream) const {
    auto arguments = Arguments<cuda::HLoraPrefillArguments>(operands);
    arguments.workspace_bytes = cuda::HLoraPrefillWorkspaceBytes(arguments);
    arguments.workspace = workspaces_->Reserve(stream, Workspaces::kPrefill, arguments.workspace_bytes);
    Raise(cuda::HLoraPrefill(arguments, stream));
  }

  template <class Result>
  Result Arguments(const LinearOperands& operands) const {
    Result arguments;
    arguments.rows = operands.rows;
    arguments.experts = operands.experts;
    arguments.x = operands.x;
    arguments.weight = weight_->Of(operands.weight);
    arguments.bias = operands.bias;
    arguments.y = operands.y;
    if (operands.experts > 0) {
      arguments.adapter_in = adapter_in_->Of(operands.adapter_in);
      arguments.adapter_out = adapter_out_->Of(operands.adapter_out);
    }
    return arguments;
  }

  std::shared_ptr<Workspaces> workspaces_;
  std::unique_ptr<WideMatrix> weight_, adapter_in_, adapter_out_;
};

}  // namespace

const OrtCustomOp* CudaLinearOperator() { return Operator<LinearKernel<CudaLinear>>(); }
const OrtCustomOp* CudaHLoraLinearOperator() { return Operator<HLoraLinearKernel<CudaLinear>>(); }

}  // namespace healthgpt
