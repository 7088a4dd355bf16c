// Rotary positions, cache append and attention over the cache: the node healthgpt::CachedAttention.
//
// It takes raw pointers, like hlora_linear.h. B batch, S new tokens, H query heads, K key/value heads (H is a multiple
// of K), D head size (even), M cache capacity.
#pragma once

#include <cstdint>

#include "hlora_linear/hlora_linear.h"
#include "parallel.h"

namespace healthgpt {

struct CachedAttentionArguments {
  int64_t batch = 0, tokens = 0, heads = 0, kv_heads = 0, head_size = 0, capacity = 0;
  int64_t window = 0;                    // how many earlier positions a position sees besides itself; 0 for all
  const int64_t* past_length = nullptr;  // (B): filled rows of the caches; past_length + S <= M
  const float* query = nullptr;          // (B, S, H * D)
  const float* key = nullptr;            // (B, S, K * D)
  const float* value = nullptr;          // (B, S, K * D)
  // Numbers from one token to the next: the output of one product for queries, keys and values can be read in place.
  int64_t query_stride = 0, key_stride = 0, value_stride = 0;
  const float* cosine = nullptr;      // (B, S, D / 2) of the new positions
  const float* sine = nullptr;        // (B, S, D / 2)
  Storage cache = Storage::kFloat32;  // or kFloat16, or kInt8 with a scale for each row of D
  void* keys = nullptr;               // (B, K, M, D): the new rows are written at past_length
  void* values = nullptr;             // (B, K, M, D)
  float* key_scales = nullptr;        // (B, K, M) for kInt8, otherwise null
  float* value_scales = nullptr;      // (B, K, M)
  float* output = nullptr;            // (B, S, H * D)
};

// Arithmetic is float32 for all types of caches. A position's bits depend neither on how many positions are in the
// call, nor on M, nor on the threads.
void CachedAttention(const CachedAttentionArguments& arguments, const Parallel& parallel, Target target = BestTarget());

}  // namespace healthgpt
