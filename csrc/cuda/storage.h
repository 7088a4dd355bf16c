// The types in the interfaces of the CUDA launchers. They need no CUDA header and no framework.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace healthgpt::cuda {

using Stream = CUstream_st*;  // cudaStream_t
// Null for success, otherwise an error message. It begins with the operation's name in brackets if the arguments are
// wrong; nothing was launched then. Other messages are CUDA's.
using Status = const char*;

enum class Storage { kFloat32, kFloat16, kBFloat16, kInt8, kInt4 };

constexpr bool IsInteger(Storage storage) { return storage == Storage::kInt8 || storage == Storage::kInt4; }

// The bits of one number.
constexpr int64_t StorageBits(Storage storage) {
  return storage == Storage::kInt4 ? 4 : storage == Storage::kInt8 ? 8 : storage == Storage::kFloat32 ? 32 : 16;
}

// A matrix (channels, outputs) in row-major order; panels (export/quantize.py) are put in it on the way. int4 holds two
// neighbouring outputs per byte, the even one in the low bits. An integer stands for
// scales(channel / block_size, output) * value.
struct Matrix {
  const void* values = nullptr;
  const float* scales = nullptr;  // (ceil(channels / block_size), outputs), null for floats
  Storage storage = Storage::kFloat16;
  int64_t channels = 0;
  int64_t outputs = 0;
  int64_t stride = 0;      // elements from one row to the next, at least `outputs`
  int64_t block_size = 0;  // 32, 64 or 128; 0 for floats
};

constexpr int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace healthgpt::cuda
