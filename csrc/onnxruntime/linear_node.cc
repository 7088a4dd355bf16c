#include "onnxruntime/linear_node.h"

#include <algorithm>

namespace healthgpt {
namespace {

constexpr int64_t kBlockStep = 4, kLargestBlock = 256;

bool IsInteger(OrtElementType type) { return type == kOrtInt8 || type == kOrtInt4; }

MatrixOperand ReadMatrix(const Tensor& values, const Tensor& scales, int64_t block_size) {
  const bool panels = values.rank == 3 && values.shape[2] == kPanel && IsInteger(values.type);
  if ((!panels && values.rank != 2) || values.elements < 1) {
    throw std::invalid_argument(std::string(values.name) + " must be a matrix that is not empty, found " +
                                values.ShapeText());
  }
  MatrixOperand matrix;
  matrix.values = values.data;
  matrix.type = values.type;
  matrix.channels = values.shape[panels ? 1 : 0];
  matrix.outputs = panels ? values.shape[0] * kPanel : values.shape[1];
  matrix.panel = panels ? kPanel : 0;
  if (values.type == kOrtFloat32 || values.type == kOrtFloat16 || values.type == kOrtBFloat16) return matrix;
  if (!IsInteger(values.type)) {
    throw std::invalid_argument(std::string(values.name) +
                                " must be float32, float16, bfloat16, int8 or int4, found the ONNX type " +
                                std::to_string(values.type));
  }
  if (block_size < kBlockStep || block_size > kLargestBlock || block_size % kBlockStep != 0) {
    throw std::invalid_argument("block_size must be a multiple of 4 up to 256, found " + std::to_string(block_size));
  }
  if (!scales.given) {
    throw std::invalid_argument(std::string(values.name) + " is quantised and must come with " + scales.name);
  }
  const int64_t blocks = (matrix.channels + block_size - 1) / block_size;
  panels ? scales.Expect({values.shape[0], blocks, kPanel}) : scales.Expect({blocks, matrix.outputs});
  if (scales.type != (panels ? kOrtBFloat16 : kOrtFloat32)) {
    throw std::invalid_argument(std::string(scales.name) + " must be " + (panels ? "bfloat16 in panels" : "float32") +
                                ", found the ONNX type " + std::to_string(scales.type));
  }
  matrix.scales = scales.data;
  matrix.block_size = block_size;
  return matrix;
}

void ExpectSize(const Tensor& tensor, const MatrixOperand& matrix, int64_t channels, int64_t outputs) {
  if (matrix.channels != channels || matrix.outputs != outputs) tensor.Expect({channels, outputs});
}

}  // namespace

LinearOperands ReadLinear(Call& call, int64_t block_size, int64_t experts, const Around& around) {
  const Tensor x = call.Input(0), bias = call.Input(3);
  LinearOperands operands;
  operands.weight = ReadMatrix(call.Input(1), call.Input(2), block_size);
  const int64_t channels = operands.weight.channels, outputs = operands.weight.outputs;
  const int64_t width = around.pair_input ? 2 * channels : channels;
  if (x.rank == 0 || x.shape[x.rank - 1] != width) {
    throw std::invalid_argument("x must end in " + std::to_string(width) + " channels, found " + x.ShapeText());
  }
  operands.rows = x.elements / width;
  operands.around = around;
  operands.x = x.As<float>();
  if (bias.given) {
    bias.Expect({outputs});
    operands.bias = bias.As<float>();
  }
  if (experts > 0) {
    const Tensor adapter_in = call.Input(4), adapter_out = call.Input(6);
    operands.adapter_in = ReadMatrix(adapter_in, call.Input(5), block_size);
    operands.adapter_out = ReadMatrix(adapter_out, call.Input(7), block_size);
    const int64_t rank = operands.adapter_out.channels;
    if (rank % experts != 0) {
      throw std::invalid_argument("the rank must be a multiple of " + std::to_string(experts) + " experts, found " +
                                  std::to_string(rank));
    }
    ExpectSize(adapter_in, operands.adapter_in, channels, rank + experts);
    ExpectSize(adapter_out, operands.adapter_out, rank, outputs);
    operands.experts = experts;
  }
  int64_t shape[Tensor::kMostDimensions];
  std::copy_n(x.shape, x.rank, shape);
  shape[x.rank - 1] = outputs;
  if (around.residual) {
    const Tensor residual = call.Input(experts > 0 ? 8 : 4);
    residual.Expect(shape, x.rank);
    operands.residual = residual.As<float>();
  }
  operands.y = static_cast<float*>(call.Output(0, shape, x.rank));
  return operands;
}

}  // namespace healthgpt
