// For sources that are compiled once per target. CMake sets SIMD_HEADER to the header with the target's Simd, and
// SIMD_TARGET to the target's name. SIMD_KERNEL(Name) is the name of the kernel for this target.
//
// The linker must not merge functions of these compilations; otherwise a processor could get instructions that it does
// not have. So everything but the kernel is in anonymous namespaces, and no standard header with inline code is used.
#pragma once

#include SIMD_HEADER
#include "simd/unroll.h"

#define SIMD_JOIN_NAMES(name, target) name##target
#define SIMD_JOIN(name, target) SIMD_JOIN_NAMES(name, target)
#define SIMD_KERNEL(name) SIMD_JOIN(name, SIMD_TARGET)
