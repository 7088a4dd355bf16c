// The kernels of Convolution: kernel.cc is compiled to one per target.
#pragma once

#include "convolution/convolution.h"
#include "target.h"

namespace healthgpt {

using ConvolutionKernel = void(const ConvolutionArguments& arguments, const Parallel& parallel);

ConvolutionKernel ConvolutionPortable, ConvolutionNeon, ConvolutionAvx2, ConvolutionAvxVnni, ConvolutionAvx512;

}  // namespace healthgpt
