// The node NormSwish (export/graph/functions.py) on a GPU, by vq_decode/cuda.h.
#include "convolution/convolution.h"
#include "onnxruntime/cuda.h"
#include "vq_decode/cuda.h"

namespace healthgpt {
namespace {

class NormSwishKernel {
 public:
  static constexpr const char* kName = "NormSwish";
  static constexpr Operand kInputs[] = {{"x", kOrtFloat32}, {"norm_weight", kOrtFloat32}, {"norm_bias", kOrtFloat32}};
  static constexpr Operand kOutputs[] = {{"y", kOrtFloat32}};

  explicit NormSwishKernel(const Attributes& attributes) : groups_(attributes.Integer("groups", 1, INT32_MAX)) {}

  void Compute(Call& call) const {
    const Tensor x = call.Input(0), weight = call.Input(1), bias = call.Input(2);
    if (x.rank != 4) throw std::invalid_argument("x must be [B, H, W, C], found " + x.ShapeText());
    cuda::GroupNormArguments arguments;
    arguments.batch = x.shape[0];
    arguments.positions = x.shape[1] * x.shape[2];
    arguments.channels = x.shape[3];
    arguments.groups = groups_;
    arguments.storage = cuda::Storage::kFloat32;
    arguments.epsilon = kGroupNormEpsilon;
    arguments.swish = true;
    weight.Expect({arguments.channels});
    bias.Expect({arguments.channels});
    arguments.x = x.data;
    arguments.weight = weight.As<float>();
    arguments.bias = bias.As<float>();
    arguments.y = call.Output(0, x.shape, x.rank);
    const cuda::Stream stream = StreamOf(call);
    const int64_t use = cuda::Workspaces::kGroupNorm - arguments.batch;
    arguments.workspace_bytes = cuda::GroupNormWorkspaceBytes(arguments);
    arguments.workspace = workspaces_->Reserve(stream, use, arguments.workspace_bytes);
    Raise(cuda::GroupNorm(arguments, stream));
  }

 private:
  int64_t groups_;
  std::shared_ptr<cuda::Workspaces> workspaces_ = cuda::Workspaces::Get();
};

}  // namespace

const OrtCustomOp* CudaNormSwishOperator() { return Operator<NormSwishKernel>(); }

}  // namespace healthgpt
