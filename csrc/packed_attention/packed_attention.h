// Attention of every token to every token, without caches or positions, as in a vision tower: the node
// healthgpt::PackedAttention.
//
// It takes raw pointers, like hlora_linear.h. B batch, T tokens, H heads, D head size.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "target.h"

namespace healthgpt {

struct PackedAttentionArguments {
  int64_t batch = 0, tokens = 0, heads = 0, head_size = 0;
  const float* packed = nullptr;  // (B, T, 3 * H * D): queries, keys, values
  float* output = nullptr;        // (B, T, H * D): softmax(query key^T / sqrt(D)) value
};

// Arithmetic is float32. The bits do not depend on the threads.
void PackedAttention(const PackedAttentionArguments& arguments, const Parallel& parallel, Target target = BestTarget());

}  // namespace healthgpt
