// The kernels of Convolution, one per target, all compiled from kernel.cc.
#pragma once

#include "convolution/convolution.h"
#include "target.h"

namespace healthgpt {

using ConvolutionKernel = void(const ConvolutionArguments& arguments, const Parallel& parallel);

ConvolutionKernel ConvolutionPortable, ConvolutionNeon, ConvolutionAvx2, ConvolutionAvxVnni, ConvolutionAvx512;

}  // namespace healthgpt
