// The kernels of CachedAttention, one per target, all compiled from kernel.cc.
#pragma once

#include "cached_attention/cached_attention.h"
#include "target.h"

namespace healthgpt {

using CachedAttentionKernel = void(const CachedAttentionArguments& arguments, const Parallel& parallel);

CachedAttentionKernel CachedAttentionPortable, CachedAttentionNeon, CachedAttentionAvx2, CachedAttentionAvxVnni,
    CachedAttentionAvx512;

}  // namespace healthgpt
