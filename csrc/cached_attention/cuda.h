// Rotary positions, cache append and attention over the cache on a GPU, made for the few tokens of a decode step:
// cached_attention.h says the rest.
#pragma once

#include "cuda/storage.h"

namespace healthgpt::cuda {

// Of a launch. More tokens, those of a prompt, are as many launches.
constexpr int64_t kMostDecodeTokens = 32;
constexpr int64_t kMostHeadSize = 128;

struct CachedAttentionArguments {
  int64_t batch = 0, tokens = 0, heads = 0, kv_heads = 0, head_size = 0, capacity = 0;
  int64_t window = 0;                    // earlier positions seen besides the own one; 0 for all
  const int64_t* past_length = nullptr;  // (B) on the GPU: filled rows of the caches; past_length + S <= M
  const float* query = nullptr;          // (B, S, H * D), tokens query_stride apart, so that a product that makes
  const float* key = nullptr;            // (B, S, K * D)  queries, keys and values side by side is read as it lies
  const float* value = nullptr;          // (B, S, K * D)
  int64_t query_stride = 0, key_stride = 0, value_stride = 0;
  const float* cosine = nullptr;      // (B, S, D / 2) of the new positions
  const float* sine = nullptr;        // (B, S, D / 2)
  Storage cache = Storage::kFloat16;  // or kBFloat16, or kInt8 with a scale for each row of D
  void* keys = nullptr;               // (B, K, M, D): the new rows are written at past_length
  void* values = nullptr;             // (B, K, M, D)
  float* key_scales = nullptr;        // (B, K, M), null but for kInt8
  float* value_scales = nullptr;      // (B, K, M)
  float* output = nullptr;            // (B, S, H * D)
  void* workspace = nullptr;          // of CachedAttentionWorkspaceBytes, zeros before the first of its calls
  int64_t workspace_bytes = 0;        // one workspace serves all layers that follow each other in a stream
};

int64_t CachedAttentionWorkspaceBytes(const CachedAttentionArguments& arguments);

// Sums are float32. A position's bits depend neither on how many positions are in the call nor on M. What would lie
// beyond M is neither written nor read; the lengths are on the GPU, so that it is for the caller to keep them in M.
Status CachedAttention(const CachedAttentionArguments& arguments, Stream stream);

}  // namespace healthgpt::cuda
