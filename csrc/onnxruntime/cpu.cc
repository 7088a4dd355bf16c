// The library of the CPU kernels.
#include "onnxruntime/kernels.h"
#include "onnxruntime/operator.h"

namespace healthgpt {

const char* Provider() { return nullptr; }

std::vector<const OrtCustomOp*> Operators() {
  return {LinearOperator(),
          HLoraLinearOperator(),
          CachedAttentionOperator(Storage::kFloat32),
          CachedAttentionOperator(Storage::kFloat16),
          CachedAttentionOperator(Storage::kInt8),
          ConvolutionOperator(),
          EnlargedConvolutionOperator(),
          NormSwishConvolutionOperator(),
          ResidualConvolutionOperator()};
}

}  // namespace healthgpt
