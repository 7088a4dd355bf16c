// The kernels of HLoraLinear, one per target, all compiled from kernel.cc.
#pragma once

#include "hlora_linear/hlora_linear.h"
#include "target.h"

namespace healthgpt {

using HLoraLinearKernel = void(const HLoraLinearArguments& arguments, const Parallel& parallel);

HLoraLinearKernel HLoraLinearPortable, HLoraLinearNeon, HLoraLinearAvx2, HLoraLinearAvxVnni, HLoraLinearAvx512;

// Whether the target's kernel multiplies many rows by tiles (tile_product.h).
using MultipliesTilesKernel = bool();

MultipliesTilesKernel MultipliesTilesPortable, MultipliesTilesNeon, MultipliesTilesAvx2, MultipliesTilesAvxVnni,
    MultipliesTilesAvx512;

}  // namespace healthgpt
