// Chooses the next token from logits on the GPU, as runtime/decoding.py does on the host. A row of codes then needs no
// exchange with the host: every replay of a CUDA graph is one step, and the step's number is in GPU memory.
#pragma once

#include "cuda/storage.h"

namespace healthgpt::cuda {

struct TokenSelectionArguments {
  int64_t batch = 0;
  int64_t rows = 0;                   // N
  int64_t first_id = 0;               // the id of row 0
  const float* logits = nullptr;      // (B, N)
  const uint32_t* allowed = nullptr;  // (ceil(N / 32)), one bit per row, lowest bit first; null allows all
  float penalty = 1;                  // above 0, for ids that were chosen before
  uint8_t* seen = nullptr;            // (B, N), 1 for ids chosen before; may be null if the penalty is 1
  float temperature = 0;              // 0 takes the largest logit, the first of equal ones
  float top_p = 1;
  int64_t steps = 0;               // T
  const float* times = nullptr;    // (T, B, N), exponential random numbers above 0; null at temperature 0
  int64_t* step = nullptr;         // (B): a call reads it and adds one; from T on a call does nothing
  int64_t* ids = nullptr;          // (T, B): the chosen ids, -1 if a logit was not finite
  int64_t* token = nullptr;        // (B): the id of this step, for the embedding lookup
  int64_t* past_length = nullptr;  // (B) or null: increased by one
};

Status TokenSelection(const TokenSelectionArguments& arguments, Stream stream);

}  // namespace healthgpt::cuda
