// y = x W + b + gate(x R) * (x A) B on a GPU, for the few rows of a decode step: hlora_linear.h says the rest.
#pragma once

#include "cuda/storage.h"

namespace healthgpt::cuda {

constexpr int64_t kMostDecodeRows = 32;
constexpr int64_t kMostExperts = 32;

struct HLoraLinearArguments {
  int64_t rows = 0;     // S, at most kMostDecodeRows
  int64_t experts = 0;  // E; 0 for a plain linear, without adapters
  const float* x = nullptr;
  Matrix weight;                // (C, O)
  const float* bias = nullptr;  // (O) or null
  Matrix adapter_in;            // (C, R + E): A, then the router; stored as weight is
  Matrix adapter_out;           // (R, O): B with the H-LoRA scaling folded in; stored as weight is
  float* y = nullptr;           // (S, O), not the memory of x
  void* workspace = nullptr;    // of HLoraLinearWorkspaceBytes, zeros before the first of its calls
  int64_t workspace_bytes = 0;  // one workspace serves all linears that follow each other in a stream
  // Where experts of several plugins share one router: each can be silenced, and they need not have equal ranks.
  const int32_t* expert_of = nullptr;  // (R), the expert that a column of A belongs to; null for equal shares of R
  const float* route_bias = nullptr;   // (E) or null, added to every row's routes
  // What a decode step does to the input and to the result on its way, at no launch of its own.
  bool normalise = false;  // x / sqrt(mean(x^2) + epsilon) before it is multiplied
  float epsilon = 0;
  bool pair_input = false;          // x is (S, 2 C): silu(x[:, :C]) * x[:, C:] is multiplied
  const float* residual = nullptr;  // (S, O) or null, added to the result; may be y
};

// The least stride at which every row of a matrix in aligned memory is read by wide loads. Others are gathered, which
// costs a matrix of 68 columns little and a large one much.
int64_t WideStride(Storage storage, int64_t outputs);

// For any call with these matrices and at most these rows.
int64_t HLoraLinearWorkspaceBytes(const HLoraLinearArguments& arguments);

// Weights are float16, bfloat16, int8 or int4; x, sums and the gate are float32 (x is multiplied as the sum of two
// numbers of 16 bits: to about 22 bits, 16 with bfloat16 weights; float16 cannot hold an x beyond 65504). A row's bits
// depend neither on the other rows of the call nor on the GPU's size.
Status HLoraLinear(const HLoraLinearArguments& arguments, Stream stream);

}  // namespace healthgpt::cuda
