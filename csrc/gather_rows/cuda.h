// Looks up rows of a table: the embedding of a token, or the codebook entry of a picture's code (export folds
// post_quant_conv into the codebook).
#pragma once

#include "cuda/storage.h"

namespace healthgpt::cuda {

struct GatherRowsArguments {
  int64_t count = 0;                    // S
  const int64_t* ids = nullptr;         // (S) on the GPU
  const void* table = nullptr;          // (N, C)
  Storage storage = Storage::kFloat16;  // of the table: float32, float16 or bfloat16
  int64_t rows = 0;                     // N
  int64_t channels = 0;                 // C
  void* output = nullptr;               // (S, C)
  bool widen = false;                   // the output is float32; otherwise it has the table's type
};

// An id outside the table gives a row of NaN, so that a wrong token does not go unnoticed.
Status GatherRows(const GatherRowsArguments& arguments, Stream stream);

}  // namespace healthgpt::cuda
