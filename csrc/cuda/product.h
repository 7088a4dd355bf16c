// The product of two large matrices: by cuBLASLt on a GPU, by plain loops in the host build.
#pragma once

#include "cuda/storage.h"

namespace healthgpt::cuda {

struct ProductArguments {
  Storage storage = Storage::kFloat16;  // of both factors: float16 or bfloat16
  int64_t rows = 0, channels = 0, outputs = 0;
  const void* left = nullptr;   // (rows, channels)
  const void* right = nullptr;  // (channels, outputs), rows right_stride apart
  int64_t right_stride = 0;
  float* result = nullptr;    // (rows, outputs)
  bool accumulate = false;    // add to the numbers in `result`
  void* workspace = nullptr;  // of kProductWorkspaceBytes, for the library's own use
};

constexpr int64_t kProductWorkspaceBytes = 32 << 20;

// Sums are float32. The first call creates the library's handle, so it must not be captured in a CUDA graph.
Status LargeProduct(const ProductArguments& arguments, Stream stream);

}  // namespace healthgpt::cuda
