// The node Linear and those with an H-LoRA linear on a GPU, by hlora_linear/rows.h.
#include <cstring>
#include <vector>

#include "cuda/shared_rows.h"
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

// The kernels take scales of float32 only.
std::vector<float> Widened(const Tensor& bfloat16) {
  const uint16_t* const from = bfloat16.As<uint16_t>();
  std::vector<float> to(static_cast<size_t>(bfloat16.elements));
  for (size_t i = 0; i < to.size(); ++i) {
    const uint32_t bits = uint32_t{from[i]} << 16;
    std::memcpy(&to[i], &bits, sizeof(float));
  }
  return to;
}

// A stored matrix of the graph, on the GPU with a stride that wide loads can read. ONNX Runtime leaves it where the
// file is mapped (linear_node.h), so that sessions of the same weights can share it.
class ResidentMatrix {
 public:
  ResidentMatrix(const Attributes& attributes, size_t index) {
    const Tensor values = attributes.Constant(index, kLinearInputs[index]);
    const Tensor scales = attributes.Constant(index + 1, kLinearInputs[index + 1]);
    if (!values.given) {
      throw std::invalid_argument(std::string(kLinearInputs[index].name) + " must be a constant on a GPU");
    }
    if ((values.rank != 2 && values.rank != 3) || values.elements == 0) return;  // ReadLinear says what is wrong
    const cuda::Storage storage = StorageOf(values.type);
    const int64_t channels = values.shape[values.rank - 2], panels = values.rank == 3 ? values.shape[0] : 1;
    const int64_t outputs = values.elements / channels;
    const int64_t bits = cuda::StorageBits(storage), row_bits = outputs * bits;
    stride_ = cuda::WideStride(storage, outputs);
    if (row_bits % (8 * panels) == 0) {
      values_ = cuda::SharedRows({values.data, channels, row_bits / 8, panels}, stride_ * bits / 8);
    } else {  // rows begin within a byte
      const int64_t bytes = cuda::CeilDivide(channels * row_bits, 8);
      stride_ = outputs;
      values_ = cuda::SharedRows({values.data, 1, bytes}, bytes);
    }
    if (!scales.given || scales.rank != values.rank || scales.elements == 0) return;
    const bool in_panels = scales.rank == 3;
    if (scales.type != (in_panels ? kOrtBFloat16 : kOrtFloat32)) return;
    const int64_t blocks = scales.shape[scales.rank - 2];
    const int64_t bytes = scales.elements / blocks * static_cast<int64_t>(sizeof(float));
    const std::vector<float> widened = in_panels ? Widened(scales) : std::vector<float>();
    const void* const data = in_panels ? widened.data() : scales.data;
    scales_ = cuda::SharedRows({data, blocks, bytes, in_panels ? scales.shape[0] : 1}, bytes);
  }

  // `operand` fits: it is what the constructor saw.
  cuda::Matrix Of(const MatrixOperand& operand) const {
    cuda::Matrix matrix;
    matrix.values = values_->data();
    matrix.scales = scales_ == nullptr ? nullptr : static_cast<const float*>(scales_->data());
    matrix.storage = StorageOf(operand.type);
    matrix.channels = operand.channels;
    matrix.outputs = operand.outputs;
    matrix.stride = stride_;
    matrix.block_size = operand.block_size;
    return matrix;
  }

 private:
  std::shared_ptr<const cuda::Memory> values_, scales_;
  int64_t stride_ = 0;
};

class CudaLinear {
 public:
  CudaLinear(const Attributes& attributes, bool has_adapters)
      : workspaces_(cuda::Workspaces::Get()), weight_(std::make_unique<ResidentMatrix>(attributes, 1)) {
    if (!has_adapters) return;
    adapter_in_ = std::make_unique<ResidentMatrix>(attributes, 4);
    adapter_out_ = std::make_unique<ResidentMatrix>(attributes, 6);
  }

  void operator()(const LinearOperands& operands, Call& call) const {
    cuda::HLoraLinearArguments arguments;
    arguments.rows = operands.rows;
    arguments.experts = operands.experts;
    arguments.x = operands.x;
    arguments.weight = weight_->Of(operands.weight);
    arguments.bias = operands.bias;
    arguments.y = operands.y;
    arguments.normalise = operands.around.normalise;
    arguments.epsilon = operands.around.epsilon;
    arguments.pair_input = operands.around.pair_input;
    arguments.residual = operands.residual;
    if (operands.experts > 0) {
      arguments.adapter_in = adapter_in_->Of(operands.adapter_in);
      arguments.adapter_out = adapter_out_->Of(operands.adapter_out);
    }
    Raise(cuda::HLoraLinearRows(arguments, *workspaces_, StreamOf(call)));
  }

 private:
  std::shared_ptr<cuda::Workspaces> workspaces_;
  std::unique_ptr<ResidentMatrix> weight_, adapter_in_, adapter_out_;
};

}  // namespace

const OrtCustomOp* CudaLinearOperator() { return Operator<LinearKernel<CudaLinear, LinearNode>>(); }
std::vector<const OrtCustomOp*> CudaHLoraLinearOperators() { return HLoraLinearOperators<CudaLinear>(); }

}  // namespace healthgpt
