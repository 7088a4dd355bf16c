// The operators of the domain "healthgpt" that the CPU has kernels for.
#pragma once

#include "hlora_linear/hlora_linear.h"
#include "onnxruntime/abi.h"

namespace healthgpt {

const OrtCustomOp* LinearOperator();
const OrtCustomOp* HLoraLinearOperator();
// ONNX Runtime infers one type of output per operator, so there is one for each type of cache.
const OrtCustomOp* CachedAttentionOperator(Storage cache);
const OrtCustomOp* ConvolutionOperator();
const OrtCustomOp* EnlargedConvolutionOperator();
const OrtCustomOp* NormSwishConvolutionOperator();
const OrtCustomOp* ResidualConvolutionOperator();

}  // namespace healthgpt
