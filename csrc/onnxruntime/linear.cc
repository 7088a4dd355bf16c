// The node Linear and those with an H-LoRA linear on the CPU, by the launcher hlora_linear.h.
#include "hlora_linear/hlora_linear.h"
#include "onnxruntime/kernels.h"
#include "onnxruntime/linear_node.h"

namespace healthgpt {
namespace {

Matrix MatrixOf(const MatrixOperand& operand) {
  Matrix matrix;
  matrix.values = operand.values;
  matrix.scales = operand.scales;
  matrix.storage = operand.type == kOrtFloat32    ? Storage::kFloat32
                   : operand.type == kOrtFloat16  ? Storage::kFloat16
                   : operand.type == kOrtBFloat16 ? Storage::kBFloat16
                   : operand.type == kOrtInt8     ? Storage::kInt8
                                                  : Storage::kInt4;
  matrix.channels = operand.channels;
  matrix.outputs = operand.outputs;
  matrix.block_size = operand.block_size;
  matrix.panel = operand.panel;
  return matrix;
}

struct CpuLinear {
  CpuLinear(const Attributes&, bool) {}

  void operator()(const LinearOperands& operands, Call& call) const {
    HLoraLinearArguments arguments;
    arguments.rows = operands.rows;
    arguments.x = operands.x;
    arguments.weight = MatrixOf(operands.weight);
    arguments.bias = operands.bias;
    arguments.y = operands.y;
    arguments.normalise = operands.around.normalise;
    arguments.epsilon = operands.around.epsilon;
    arguments.pair_input = operands.around.pair_input;
    arguments.quick_gelu = operands.around.quick_gelu;
    arguments.residual = operands.residual;
    arguments.experts = operands.experts;
    if (operands.experts > 0) {
      arguments.adapter_in = MatrixOf(operands.adapter_in);
      arguments.adapter_out = MatrixOf(operands.adapter_out);
    }
    HLoraLinear(arguments, call.Threads());
  }
};

}  // namespace

std::vector<const OrtCustomOp*> LinearOperators() {
  std::vector<const OrtCustomOp*> operators = HLoraLinearOperators<CpuLinear>();
  for (const OrtCustomOp* one :
       LinearOperatorsOf<CpuLinear, LinearNode, ResidualLinearNode, QuickGeluResidualLinearNode>()) {
    operators.push_back(one);
  }
  return operators;
}

}  // namespace healthgpt
