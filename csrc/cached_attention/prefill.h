// Rotary positions, cache append and attention over the cache on a GPU, for the many tokens of a prompt. For few tokens
// see cuda.h.
#pragma once

#include "cached_attention/cuda.h"

namespace healthgpt::cuda {

// The arguments are those of CachedAttention, for any number of tokens; caches are float16 or int8, and no workspace is
// needed. The caches get the bits that CachedAttention gives them. Scores and sums are float32. Rounded to float16 are
// rotated queries, softmax weights, and what int8 caches stand for. A value that is not finite reaches up to 63 tokens
// before its own.
Status CachedAttentionPrefill(const CachedAttentionArguments& arguments, Stream stream);

}  // namespace healthgpt::cuda
