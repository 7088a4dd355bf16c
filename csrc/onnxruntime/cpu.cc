// The library of the CPU kernels.
#include "onnxruntime/kernels.h"
#include "onnxruntime/operator.h"

namespace healthgpt {

const char* Provider() { return nullptr; }

std::vector<const OrtCustomOp*> Operators() {
  std::vector<const OrtCustomOp*> operators;
  for (const auto& some :
       {LinearOperators(), CachedAttentionOperators(), PackedAttentionOperators(), ConvolutionOperators()}) {
    operators.insert(operators.end(), some.begin(), some.end());
  }
  return operators;
}

}  // namespace healthgpt
