// The operators of the domain "healthgpt" with CPU kernels.
#pragma once

#include <vector>

#include "onnxruntime/abi.h"

namespace healthgpt {

std::vector<const OrtCustomOp*> LinearOperators();
// ONNX Runtime infers one output type per operator, so there are operators for each type of cache.
std::vector<const OrtCustomOp*> CachedAttentionOperators();
std::vector<const OrtCustomOp*> PackedAttentionOperators();
std::vector<const OrtCustomOp*> ConvolutionOperators();

}  // namespace healthgpt
