// healthgpt::Linear and healthgpt::HLoraLinear (export/graph/functions.py) by the launcher hlora_linear.h.
#include <algorithm>

#include "hlora_linear/hlora_linear.h"
#include "onnxruntime/kernels.h"
#include "onnxruntime/operator.h"

namespace healthgpt {
namespace {

// What the launcher takes.
constexpr int64_t kBlockStep = 4, kLargestBlock = 256;

// A float matrix has no blocks, whatever the attribute says.
int64_t BlockSize(const Attributes& attributes) { return attributes.Integer("block_size", 0, INT64_MAX); }

Matrix ReadMatrix(const Tensor& values, const Tensor& scales, int64_t block_size) {
  if (values.rank != 2 || values.shape[0] < 1 || values.shape[1] < 1) {
    throw std::invalid_argument(std::string(values.name) + " must be a matrix that is not empty, found " +
                                values.ShapeText());
  }
  Matrix matrix;
  matrix.values = values.data;
  matrix.channels = values.shape[0];
  matrix.outputs = values.shape[1];
  switch (values.type) {
    case kOrtFloat32:
      matrix.storage = Storage::kFloat32;
      return matrix;
    case kOrtFloat16:
      matrix.storage = Storage::kFloat16;
      return matrix;
    case kOrtInt8:
      matrix.storage = Storage::kInt8;
      break;
    case kOrtInt4:
      matrix.storage = Storage::kInt4;
      break;
    default:
      throw std::invalid_argument(std::string(values.name) +
                                  " must be float32, float16, int8 or int4, found the ONNX type " +
                                  std::to_string(values.type));
  }
  if (block_size < kBlockStep || block_size > kLargestBlock || block_size % kBlockStep != 0) {
    throw std::invalid_argument("block_size must be a multiple of 4 up to 256, found " + std::to_string(block_size));
  }
  if (!scales.given)
    throw std::invalid_argument(std::string(values.name) + " is quantised and must come with " + scales.name);
  scales.Expect({(matrix.channels + block_size - 1) / block_size, matrix.outputs});
  matrix.scales = scales.As<float>();
  matrix.block_size = block_size;
  return matrix;
}

// x, W and b, at inputs 0 to 3, and y.
HLoraLinearArguments ReadLinear(Call& call, int64_t block_size) {
  const Tensor x = call.Input(0), bias = call.Input(3);
  HLoraLinearArguments arguments;
  arguments.weight = ReadMatrix(call.Input(1), call.Input(2), block_size);
  const int64_t channels = arguments.weight.channels, outputs = arguments.weight.outputs;
  if (x.rank == 0 || x.shape[x.rank - 1] != channels) {
    throw std::invalid_argument("x must end in " + std::to_string(channels) + " channels, found " + x.ShapeText());
  }
  arguments.rows = x.elements / channels;
  arguments.x = x.As<float>();
  if (bias.given) {
    bias.Expect({outputs});
    arguments.bias = bias.As<float>();
  }
  int64_t shape[Tensor::kMostDimensions];
  std::copy_n(x.shape, x.rank, shape);
  shape[x.rank - 1] = outputs;
  arguments.y = static_cast<float*>(call.Output(0, shape, x.rank));
  return arguments;
}

class LinearKernel {
 public:
  static constexpr const char* kName = "Linear";
  static constexpr Operand kInputs[] = {
      {"x", kOrtFloat32},
      {"weight", kOrtUndefined},
      {"weight_scale", kOrtFloat32, kOrtOptional},
      {"bias", kOrtFloat32, kOrtOptional},
  };
  static constexpr Operand kOutputs[] = {{"y", kOrtFloat32}};

  explicit LinearKernel(const Attributes& attributes) : block_size_(BlockSize(attributes)) {}

  void Compute(Call& call) const { HLoraLinear(ReadLinear(call, block_size_), call.Threads()); }

 private:
  int64_t block_size_;
};

class HLoraLinearKernel {
 public:
  static constexpr const char* kName = "HLoraLinear";
  static constexpr Operand kInputs[] = {
      {"x", kOrtFloat32},
      {"weight", kOrtUndefined},
      {"weight_scale", kOrtFloat32, kOrtOptional},
      {"bias", kOrtFloat32, kOrtOptional},
      {"adapter_in", kOrtUndefined},
      {"adapter_in_scale", kOrtFloat32, kOrtOptional},
      {"adapter_out", kOrtUndefined},
      {"adapter_out_scale", kOrtFloat32, kOrtOptional},
  };
  static constexpr Operand kOutputs[] = {{"y", kOrtFloat32}};

  explicit HLoraLinearKernel(const Attributes& attributes)
      : block_size_(BlockSize(attributes)), experts_(attributes.Integer("experts", 1, INT32_MAX)) {}

  void Compute(Call& call) const {
    HLoraLinearArguments arguments = ReadLinear(call, block_size_);
    const Tensor adapter_in = call.Input(4), adapter_out = call.Input(6);
    arguments.adapter_in = ReadMatrix(adapter_in, call.Input(5), block_size_);
    arguments.adapter_out = ReadMatrix(adapter_out, call.Input(7), block_size_);
    const int64_t rank = arguments.adapter_out.channels;
    if (rank % experts_ != 0) {
      throw std::invalid_argument("the rank must be a multiple of " + std::to_string(experts_) + " experts, found " +
                                  std::to_string(rank));
    }
    adapter_in.Expect({arguments.weight.channels, rank + experts_});
    adapter_out.Expect({rank, arguments.weight.outputs});
    arguments.experts = experts_;
    HLoraLinear(arguments, call.Threads());
  }

 private:
  int64_t block_size_, experts_;
};

}  // namespace

const OrtCustomOp* LinearOperator() { return Operator<LinearKernel>(); }
const OrtCustomOp* HLoraLinearOperator() { return Operator<HLoraLinearKernel>(); }

}  // namespace healthgpt
