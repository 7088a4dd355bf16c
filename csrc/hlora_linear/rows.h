// The H-LoRA linear of any number of rows, for nodes of a graph: they know operands alone.
#pragma once

#include "cuda/workspaces.h"
#include "hlora_linear/cuda.h"

namespace healthgpt::cuda {

// Raised with every change that makes an engine unusable which has this linear as a plugin and holds its operands
// (runtime/executors/hlora_plugin.py).
constexpr int kHLoraLinearVersion = 1;

// As many as a pass of drafts has at most (runtime/drafting/pace.py): a row of it must have the bits of a plain step.
constexpr int64_t kMostExactRows = 64;

// Any number of rows: up to kMostExactRows by cuda.h, more by prefill.h, which needs cuBLASLt. Of what a decode step
// does on its way only the linear itself. Throws where there is no working memory.
Status HLoraLinearRows(HLoraLinearArguments arguments, Workspaces& workspaces, Stream stream);

}  // namespace healthgpt::cuda
