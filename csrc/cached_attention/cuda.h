// Rotary positions, cache append and attention over the cache on a GPU, for the few tokens of a decode step. See
// cached_attention.h for the operation itself, and prefill.h for many tokens.
#pragma once

#include "cuda/storage.h"

namespace healthgpt::cuda {

// The new tokens of one launch. More tokens, as of a prompt, take several launches.
constexpr int64_t kMostDecodeTokens = 32;
constexpr int64_t kMostHeadSize = 128;

struct CachedAttentionArguments {
  int64_t batch = 0, tokens = 0, heads = 0, kv_heads = 0, head_size = 0, capacity = 0;
  int64_t window = 0;                    // how many earlier positions a position sees besides itself; 0 for all
  const int64_t* past_length = nullptr;  // (B) on the GPU: filled rows of the caches; past_length + S <= M
  const float* query = nullptr;          // (B, S, H * D)
  const float* key = nullptr;            // (B, S, K * D)
  const float* value = nullptr;          // (B, S, K * D)
  // Elements from one token to the next: the output of one product for queries, keys and values can be read in place.
  int64_t query_stride = 0, key_stride = 0, value_stride = 0;
  const float* cosine = nullptr;      // (B, S, D / 2), of the new positions
  const float* sine = nullptr;        // (B, S, D / 2)
  Storage cache = Storage::kFloat16;  // or kBFloat16, or kInt8 with a scale for each row of D
  void* keys = nullptr;               // (B, K, M, D): the new rows are written at past_length
  void* values = nullptr;             // (B, K, M, D)
  float* key_scales = nullptr;        // (B, K, M) for kInt8, otherwise null
  float* value_scales = nullptr;      // (B, K, M)
  float* output = nullptr;            // (B, S, H * D)
  void* workspace = nullptr;          // of CachedAttentionWorkspaceBytes, set to zero before its first use
  int64_t workspace_bytes = 0;        // layers that follow each other in a stream can share one workspace
};

// The error of operands that do not fit together or are not supported, or null. The workspace is not checked.
Status CheckOperands(const CachedAttentionArguments& arguments);

int64_t CachedAttentionWorkspaceBytes(const CachedAttentionArguments& arguments);

// Sums are float32. A position's bits depend neither on how many positions are in the call nor on M. Positions beyond M
// are neither written nor read. The lengths are on the GPU, so the caller must keep past_length + S within M.
Status CachedAttention(const CachedAttentionArguments& arguments, Stream stream);

}  // namespace healthgpt::cuda
