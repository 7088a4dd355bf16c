// What the nodes on a GPU share: their operators, their stream, and the error of a launcher's status.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/workspaces.h"
#include "onnxruntime/operator.h"

namespace healthgpt {

const OrtCustomOp* CudaLinearOperator();
std::vector<const OrtCustomOp*> CudaHLoraLinearOperators();
std::vector<const OrtCustomOp*> CudaCachedAttentionOperators();
const OrtCustomOp* CudaNormSwishOperator();

inline cuda::Stream StreamOf(const Call& call) { return static_cast<cuda::Stream>(call.Stream()); }

inline void Raise(cuda::Status status) {
  if (status != nullptr) throw std::runtime_error(status[0] == '[' ? status : std::string("CUDA: ") + status);
}

}  // namespace healthgpt
