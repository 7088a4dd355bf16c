// The kernels of PackedAttention, one per target, all compiled from kernel.cc.
#pragma once

#include "packed_attention/packed_attention.h"

namespace healthgpt {

using PackedAttentionKernel = void(const PackedAttentionArguments& arguments, const Parallel& parallel);

PackedAttentionKernel PackedAttentionPortable, PackedAttentionNeon, PackedAttentionAvx2, PackedAttentionAvxVnni,
    PackedAttentionAvx512;

}  // namespace healthgpt
