// The loops of the ceilings: kernel.cc is compiled to one set per target.
#pragma once

#include <cstddef>

#include "target.h"

namespace healthgpt {

// Each does some work and returns how much: operations, or bytes of the memory it is given.
struct CeilingLoops {
  using Loop = double (*)(const void* memory, size_t bytes);
  Loop int8, float32, read;
};

using CeilingsKernel = CeilingLoops();

CeilingsKernel CeilingsPortable, CeilingsNeon, CeilingsAvx2, CeilingsAvxVnni, CeilingsAvx512;

}  // namespace healthgpt
