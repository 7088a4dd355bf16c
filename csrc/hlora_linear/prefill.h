// y = x W + b + gate(x R) * (x A) B on a GPU for the many rows of a prefill. A library does the large products, kernels
// the steps between them. For few rows see cuda.h.
#pragma once

#include "cuda/storage.h"

namespace healthgpt::cuda {

struct HLoraPrefillArguments {
  int64_t rows = 0;     // S
  int64_t experts = 0;  // E; 0 for a plain linear, without adapters
  const float* x = nullptr;
  Matrix weight;                       // (C, O)
  const float* bias = nullptr;         // (O) or null
  Matrix adapter_in;                   // (C, R + E): A, then the router; stored as weight is
  Matrix adapter_out;                  // (R, O): B with the H-LoRA scaling folded in; stored as weight is
  const int32_t* expert_of = nullptr;  // (R) or null, as in cuda.h
  const float* route_bias = nullptr;   // (E) or null, as in cuda.h
  float* y = nullptr;                  // (S, O)
  void* workspace = nullptr;           // of HLoraPrefillWorkspaceBytes; holds nothing between calls
  int64_t workspace_bytes = 0;
};

int64_t HLoraPrefillWorkspaceBytes(const HLoraPrefillArguments& arguments);

// x and gate(x R) * (x A) are rounded to 16 bits, as in the original, and so are integer weights (to float16). Sums and
// the gate are float32.
Status HLoraPrefill(const HLoraPrefillArguments& arguments, Stream stream);

}  // namespace healthgpt::cuda
