// The H-LoRA linear for any number of rows, for the nodes of a graph, which have operands but no working memory.
#pragma once

#include "cuda/workspaces.h"
#include "hlora_linear/cuda.h"

namespace healthgpt::cuda {

// Must be raised with every change after which an engine cannot be used any more that has this linear as a plugin and
// stores its operands (runtime/executors/hlora_plugin.py).
constexpr int kHLoraLinearVersion = 1;

// The most rows of a pass with drafts (runtime/drafting/pace.py). Each of them must have the bits of a plain step.
constexpr int64_t kMostExactRows = 64;

// Up to kMostExactRows rows go through cuda.h, more through prefill.h, which needs cuBLASLt. Throws if there is no
// working memory.
Status HLoraLinearRows(HLoraLinearArguments arguments, Workspaces& workspaces, Stream stream);

}  // namespace healthgpt::cuda
