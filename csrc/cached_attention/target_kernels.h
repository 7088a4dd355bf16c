// The kernels of CachedAttention: kernel.cc is compiled to one per target.
#pragma once

#include "cached_attention/cached_attention.h"
#include "target.h"

namespace healthgpt {

using CachedAttentionKernel = void(const CachedAttentionArguments& arguments, const Parallel& parallel);

CachedAttentionKernel CachedAttentionPortable, CachedAttentionNeon, CachedAttentionAvx2, CachedAttentionAvxVnni,
    CachedAttentionAvx512;

}  // namespace healthgpt
