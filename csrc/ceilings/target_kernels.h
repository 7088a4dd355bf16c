// The loops of the ceilings, one set per target, all compiled from kernel.cc.
#pragma once

#include <cstddef>

#include "target.h"

namespace healthgpt {

// Each does some work and returns the amount: operations, or bytes read from `memory`.
struct CeilingLoops {
  using Loop = double (*)(const void* memory, size_t bytes);
  Loop int8, float32;
  Loop read[2];  // without prefetches and with them
};

using CeilingsKernel = CeilingLoops();

CeilingsKernel CeilingsPortable, CeilingsNeon, CeilingsAvx2, CeilingsAvxVnni, CeilingsAvx512;

}  // namespace healthgpt
