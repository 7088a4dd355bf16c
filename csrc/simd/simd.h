// For a source that is compiled once per target: CMake sets SIMD_HEADER to the header with the target's Simd, and
// SIMD_TARGET to its name. SIMD_KERNEL(Name) is the name of the kernel for it.
//
// Nothing of it may be shared between these compilations, or a processor could be given another's instructions. So all
// but the kernel is in anonymous namespaces, and no header of the standard library with inline code is used.
#pragma once

#include SIMD_HEADER
#include "simd/unroll.h"

#define SIMD_JOIN_NAMES(name, target) name##target
#define SIMD_JOIN(name, target) SIMD_JOIN_NAMES(name, target)
#define SIMD_KERNEL(name) SIMD_JOIN(name, SIMD_TARGET)
