// The kernels of HLoraLinear, one per target, all compiled from kernel.cc.
#pragma once

#include "hlora_linear/hlora_linear.h"
#include "target.h"

namespace healthgpt {

using HLoraLinearKernel = void(const HLoraLinearArguments& arguments, const Parallel& parallel);

HLoraLinearKernel HLoraLinearPortable, HLoraLinearNeon, HLoraLinearAvx2, HLoraLinearAvxVnni, HLoraLinearAvx512;

}  // namespace healthgpt
