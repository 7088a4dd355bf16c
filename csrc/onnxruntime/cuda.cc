// The library of the kernels for ONNX Runtime's CUDA provider. The host build registers them for the CPU provider.
#include "onnxruntime/cuda.h"

namespace healthgpt {

#ifdef HEALTHGPT_CUDA_HOST
const char* Provider() { return nullptr; }
#else
const char* Provider() { return "CUDAExecutionProvider"; }
#endif

std::vector<const OrtCustomOp*> Operators() {
  std::vector<const OrtCustomOp*> operators = {CudaLinearOperator(), CudaNormSwishOperator()};
  for (const OrtCustomOp* one : CudaHLoraLinearOperators()) operators.push_back(one);
  for (const OrtCustomOp* one : CudaCachedAttentionOperators()) operators.push_back(one);
  return operators;
}

}  // namespace healthgpt
