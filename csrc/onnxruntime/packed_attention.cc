// The node PackedAttention (export/graph/functions.py) on the CPU, by the launcher packed_attention.h.
#include "packed_attention/packed_attention.h"

#include "onnxruntime/kernels.h"
#include "onnxruntime/operator.h"

namespace healthgpt {
namespace {

class PackedAttentionKernel {
 public:
  static constexpr const char* kName = "PackedAttention";
  static constexpr Operand kInputs[] = {{"packed", kOrtFloat32}};
  static constexpr Operand kOutputs[] = {{"output", kOrtFloat32}};

  explicit PackedAttentionKernel(const Attributes& attributes) : heads_(attributes.Integer("heads", 1, INT32_MAX)) {}

  void Compute(Call& call) const {
    const Tensor packed = call.Input(0);
    if (packed.rank != 3 || packed.shape[2] == 0 || packed.shape[2] % (3 * heads_) != 0) {
      throw std::invalid_argument("packed must be [B, T, 3 * " + std::to_string(heads_) + " * D], found " +
                                  packed.ShapeText());
    }
    PackedAttentionArguments arguments;
    arguments.batch = packed.shape[0];
    arguments.tokens = packed.shape[1];
    arguments.heads = heads_;
    arguments.head_size = packed.shape[2] / (3 * heads_);
    arguments.packed = packed.As<float>();
    const int64_t shape[] = {arguments.batch, arguments.tokens, packed.shape[2] / 3};
    arguments.output = static_cast<float*>(call.Output(0, shape, std::size(shape)));
    PackedAttention(arguments, call.Threads());
  }

 private:
  int64_t heads_;
};

}  // namespace

std::vector<const OrtCustomOp*> PackedAttentionOperators() { return {Operator<PackedAttentionKernel>()}; }

}  // namespace healthgpt
