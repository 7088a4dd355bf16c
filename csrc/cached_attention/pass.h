// Attention for a pass of any number of new tokens, for the nodes of a graph, which have no working memory.
#pragma once

#include "cached_attention/cuda.h"
#include "cuda/workspaces.h"

namespace healthgpt::cuda {

// Up to kMostExactRows tokens (hlora_linear/rows.h) go through cuda.h, so that each has the bits of a plain step. More
// go through prefill.h, but for bfloat16 caches. Throws if there is no working memory.
Status CachedAttentionPass(CachedAttentionArguments arguments, Workspaces& workspaces, Stream stream);

}  // namespace healthgpt::cuda
