// Rows of a table: a token's embedding, or a code's column of the picture (post_quant_conv is folded into the
// codebook).
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
  bool widen = false;                   // to float32; else as the table
};

// An id outside the table gives a row of NaN: a wrong token must not look like one.
Status GatherRows(const GatherRowsArguments& arguments, Stream stream);

}  // namespace healthgpt::cuda
