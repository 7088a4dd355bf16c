// y = x W + b + gate(x R) * (x A) B on a GPU, for the few rows of a decode step. See hlora_linear.h for the formula and
// prefill.h for many rows.
#pragma once

#include "cuda/storage.h"

namespace healthgpt::cuda {

constexpr int64_t kMostDecodeRows = 32;
constexpr int64_t kMostExperts = 32;

struct HLoraLinearArguments {
  int64_t rows = 0;     // S, for HLoraLinear at most kMostDecodeRows
  int64_t experts = 0;  // E, at most kMostExperts; 0 for a plain linear, without adapters
  const float* x = nullptr;
  Matrix weight;                // (C, O)
  const float* bias = nullptr;  // (O) or null
  Matrix adapter_in;            // (C, R + E): A, then the router; stored as weight is
  Matrix adapter_out;           // (R, O): B with the H-LoRA scaling folded in; stored as weight is
  float* y = nullptr;           // (S, O), must not overlap x
  void* workspace = nullptr;    // of HLoraLinearWorkspaceBytes, at a multiple of 16, set to zero before its first use
  int64_t workspace_bytes = 0;  // linears that follow each other in a stream can share one workspace
  // For several plugins that share one router. Their experts may have different ranks, and each can be switched off.
  const int32_t* expert_of = nullptr;  // (R), the expert that a column of A belongs to; null for equal shares of R
  const float* route_bias = nullptr;   // (E) or null, added to every row's routes
  // Neighbouring operations of a decode step, done here without launches of their own.
  bool normalise = false;  // replaces x by x / sqrt(mean(x^2) + epsilon)
  float epsilon = 0;
  bool pair_input = false;          // x is (S, 2 C) and stands for silu(x[:, :C]) * x[:, C:]
  const float* residual = nullptr;  // (S, O) or null, added to the result; may be y
};

// The smallest stride with which wide loads can read every row of a matrix in aligned memory. With other strides
// numbers are gathered one by one, which is cheap for a matrix of 68 columns and expensive for a large one.
int64_t WideStride(Storage storage, int64_t outputs);

// The error of operands that do not fit together or are not supported, or null. Rows and workspace are not checked.
Status CheckOperands(const HLoraLinearArguments& arguments);

// Enough for any call with these matrices and at most these rows.
int64_t HLoraLinearWorkspaceBytes(const HLoraLinearArguments& arguments);

// Weights are float16, bfloat16, int8 or int4; x, sums and the gate are float32. x is multiplied as the sum of two
// 16-bit numbers, which keeps about 22 bits, or 16 with bfloat16 weights; float16 cannot hold an x beyond 65504. A
// row's bits depend neither on the other rows of the call nor on the GPU's size.
Status HLoraLinear(const HLoraLinearArguments& arguments, Stream stream);

}  // namespace healthgpt::cuda
