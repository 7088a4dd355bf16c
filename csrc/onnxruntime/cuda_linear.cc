// The node Linear and those with an H-LoRA linear on a GPU, by hlora_linear/rows.h.
#include "hlora_linear/rows.h"
#include "onnxruntime/cuda.h"
#include "onnxruntime/linear_node.h"

namespace healthgpt {
namespace {

cuda::Storage StorageOf(OrtElementType type) {
  switch (type) {
    case kOrtFloat16:
      return cuda::Storage::kFloat16;
    case kOrtBFloat16:
      return cuda::Storage::kBFloat16;
    case kOrtInt8:
      return cuda::Storage::kInt8;
    case kOrtInt4:
      return cuda::Storage::kInt4;
    default:
      throw std::invalid_argument("weights must be float16, bfloat16, int8 or int4 on a GPU, found float32");
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

// A copy of a stored matrix with a stride that wide loads can read. There is no copy if the matrix has such a stride
// already, if its rows begin inside a byte, or if it is not a constant of the graph.
class WideMatrix {
 public:
  WideMatrix(const Attributes& attributes, size_t index) {
    const Tensor values = attributes.Constant(index, kHLoraLinearInputs[index]);
    if (!values.given || values.rank != 2 || values.elements == 0 || values.type == kOrtFloat32) return;
    const cuda::Storage storage = StorageOf(values.type);
    const int64_t bits = cuda::StorageBits(storage);
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
      : workspaces_(cuda::Workspaces::Get()), weight_(std::make_unique<WideMatrix>(attributes, 1)) {
    if (!has_adapters) return;
    adapter_in_ = std::make_unique<WideMatrix>(attributes, 4);
    adapter_out_ = std::make_unique<WideMatrix>(attributes, 6);
  }

  void operator()(const LinearOperands& operands, Call& call) const {
    cuda::HLoraLinearArguments arguments;
    arguments.rows = operands.rows;
    arguments.experts = operands.experts;
    arguments.x = operands.x;
    arguments.weight = weight_->Of(operands.weight);
    arguments.bias = operands.bias;
    arguments.y = operands.y;
    arguments.normalise = operands.normalise;
    arguments.epsilon = operands.epsilon;
    arguments.pair_input = operands.pair_input;
    arguments.residual = operands.residual;
    if (operands.experts > 0) {
      arguments.adapter_in = adapter_in_->Of(operands.adapter_in);
      arguments.adapter_out = adapter_out_->Of(operands.adapter_out);
    }
    Raise(cuda::HLoraLinearRows(arguments, *workspaces_, StreamOf(call)));
  }

 private:
  std::shared_ptr<cuda::Workspaces> workspaces_;
  std::unique_ptr<WideMatrix> weight_, adapter_in_, adapter_out_;
};

}  // namespace

const OrtCustomOp* CudaLinearOperator() { return Operator<LinearKernel<CudaLinear>>(); }
std::vector<const OrtCustomOp*> CudaHLoraLinearOperators() { return HLoraLinearOperators<CudaLinear>(); }

}  // namespace healthgpt
