// The product of two large matrices, by a library: cuBLASLt on a GPU. On the host, loops in its place.
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
  bool accumulate = false;    // adds to what stands there
  void* workspace = nullptr;  // of kProductWorkspaceBytes, for the library to use as it likes
};

constexpr int64_t kProductWorkspaceBytes = 32 << 20;

// Sums are float32. The first call on a GPU makes the library's handle, so it must not be captured in a graph.
Status LargeProduct(const ProductArguments& arguments, Stream stream);

}  // namespace healthgpt::cuda
