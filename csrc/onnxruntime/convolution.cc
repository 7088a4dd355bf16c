// The nodes of the VQGAN's 3x3 convolutions (export/graph/functions.py) on the CPU, by the launcher convolution.h.
#include "convolution/convolution.h"

#include "onnxruntime/kernels.h"
#include "onnxruntime/operator.h"

namespace healthgpt {
namespace {

constexpr Operand kOperands[] = {
    {"x", kOrtFloat32},           {"weight", kOrtUndefined},  {"bias", kOrtFloat32},
    {"norm_weight", kOrtFloat32}, {"norm_bias", kOrtFloat32}, {"residual", kOrtFloat32},
};

// The four nodes differ in the number of their operands and in the size of the result.
struct Plain {
  static constexpr const char* kName = "Convolution";
  static constexpr size_t kOperandCount = 3;
  static constexpr int64_t kEnlarge = 1;
};
struct Enlarged {
  static constexpr const char* kName = "EnlargedConvolution";
  static constexpr size_t kOperandCount = 3;
  static constexpr int64_t kEnlarge = 2;
};
struct NormSwish {
  static constexpr const char* kName = "NormSwishConvolution";
  static constexpr size_t kOperandCount = 5;
  static constexpr int64_t kEnlarge = 1;
};
struct Residual {
  static constexpr const char* kName = "ResidualConvolution";
  static constexpr size_t kOperandCount = 6;
  static constexpr int64_t kEnlarge = 1;
};

template <class Node>
class ConvolutionKernel {
  static constexpr auto kOperandArray = FirstOperands<Node::kOperandCount>(kOperands);
  static constexpr bool kNormed = Node::kOperandCount > 3;

 public:
  static constexpr const char* kName = Node::kName;
  static constexpr const auto& kInputs = kOperandArray;
  static constexpr Operand kOutputs[] = {{"y", kOrtFloat32}};

  explicit ConvolutionKernel(const Attributes& attributes)
      : groups_(kNormed ? attributes.Integer("groups", 1, INT32_MAX) : 0) {}

  void Compute(Call& call) const {
    const Tensor x = call.Input(0), weight = call.Input(1), bias = call.Input(2);
    if (x.rank != 4) throw std::invalid_argument("x must be [B, H, W, C], found " + x.ShapeText());
    if (weight.rank != 4) throw std::invalid_argument("weight must be [3, 3, C, O], found " + weight.ShapeText());
    if (weight.type != kOrtFloat32 && weight.type != kOrtFloat16) {
      throw std::invalid_argument("weight must be float32 or float16, found the ONNX type " +
                                  std::to_string(weight.type));
    }
    ConvolutionArguments arguments;
    arguments.batch = x.shape[0];
    arguments.height = x.shape[1];
    arguments.width = x.shape[2];
    arguments.channels = x.shape[3];
    arguments.outputs = weight.shape[3];
    arguments.groups = groups_;
    arguments.enlarge = Node::kEnlarge;
    weight.Expect({3, 3, arguments.channels, arguments.outputs});
    bias.Expect({arguments.outputs});
    arguments.x = x.As<float>();
    arguments.weight = weight.data;
    arguments.half = weight.type == kOrtFloat16;
    arguments.bias = bias.As<float>();
    if constexpr (kNormed) {
      const Tensor norm_weight = call.Input(3), norm_bias = call.Input(4);
      if (arguments.channels < groups_ || arguments.channels % groups_ != 0) {
        throw std::invalid_argument("groups must divide " + std::to_string(arguments.channels) + " channels, found " +
                                    std::to_string(groups_));
      }
      norm_weight.Expect({arguments.channels});
      norm_bias.Expect({arguments.channels});
      arguments.norm_weight = norm_weight.As<float>();
      arguments.norm_bias = norm_bias.As<float>();
    }
    const int64_t shape[] = {arguments.batch, Node::kEnlarge * arguments.height, Node::kEnlarge * arguments.width,
                             arguments.outputs};
    if constexpr (Node::kOperandCount > 5) {
      const Tensor residual = call.Input(5);
      residual.Expect({shape[0], shape[1], shape[2], shape[3]});
      arguments.residual = residual.As<float>();
    }
    arguments.y = static_cast<float*>(call.Output(0, shape, std::size(shape)));
    Convolution(arguments, call.Threads());
  }

 private:
  int64_t groups_;
};

}  // namespace

std::vector<const OrtCustomOp*> ConvolutionOperators() {
  return {Operator<ConvolutionKernel<Plain>>(), Operator<ConvolutionKernel<Enlarged>>(),
          Operator<ConvolutionKernel<NormSwish>>(), Operator<ConvolutionKernel<Residual>>()};
}

}  // namespace healthgpt
