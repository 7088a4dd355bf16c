// The operators of the domain "healthgpt" with CPU kernels.
#pragma once

#include "hlora_linear/hlora_linear.h"
#include "onnxruntime/abi.h"

namespace healthgpt {

const OrtCustomOp* LinearOperator();
const OrtCustomOp* HLoraLinearOperator();
// ONNX Runtime infers one output type per operator, so there is an operator for each type of cache.
const OrtCustomOp* CachedAttentionOperator(Storage cache);
const OrtCustomOp* ConvolutionOperator();
const OrtCustomOp* EnlargedConvolutionOperator();
const OrtCustomOp* NormSwishConvolutionOperator();
const OrtCustomOp* ResidualConvolutionOperator();

}  // namespace healthgpt
