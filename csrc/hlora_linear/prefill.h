// y = x W + b + gate(x R) * (x A) B on a GPU for the many rows of a prefill. A library does the large products, kernels
// the steps between them. For few rows see cuda.h.
#pragma once

#include "hlora_linear/cuda.h"

namespace healthgpt::cuda {

int64_t HLoraPrefillWorkspaceBytes(const HLoraLinearArguments& arguments);

// The arguments are those of HLoraLinear. The workspace need not begin with zeros.
// x, normalised or paired, and gate(x R) * (x A) are rounded to 16 bits, as in the original, and so are integer weights
// (to float16). Sums and the gate are float32.
Status HLoraPrefill(const HLoraLinearArguments& arguments, Stream stream);

}  // namespace healthgpt::cuda
