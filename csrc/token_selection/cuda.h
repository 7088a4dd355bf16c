// The next token from logits, chosen on the GPU as runtime/decoding.py chooses it: so that a row of codes needs no word
// with the host. Every replay of a CUDA graph is a step; its number, and what follows from it, is in the GPU's memory.
#pragma once

#include "cuda/storage.h"

namespace healthgpt::cuda {

struct TokenSelectionArguments {
  int64_t batch = 0;
  int64_t rows = 0;                   // N
  int64_t first_id = 0;               // of row 0
  const float* logits = nullptr;      // (B, N)
  const uint32_t* allowed = nullptr;  // (ceil(N / 32)) bits, the first in the lowest; null for all
  float penalty = 1;                  // of ids that were chosen before
  uint8_t* seen = nullptr;            // (B, N), 1 for those; null where the penalty is 1
  float temperature = 0;              // 0 for the largest logit, the first of equal ones
  float top_p = 1;
  int64_t steps = 0;               // T
  const float* times = nullptr;    // (T, B, N) above 0, exponential, drawn beforehand; null at temperature 0
  int64_t* step = nullptr;         // (B): a call reads it and adds one; from T on it does nothing
  int64_t* ids = nullptr;          // (T, B): what was chosen, -1 where a logit was not finite
  int64_t* token = nullptr;        // (B): the same, for what looks up the embedding
  int64_t* past_length = nullptr;  // (B) or null: one is added for the token chosen
};

Status TokenSelection(const TokenSelectionArguments& arguments, Stream stream);

}  // namespace healthgpt::cuda
