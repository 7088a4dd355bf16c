// What every CUDA launcher's interface is made of, for whoever calls it: no CUDA header, no framework.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace healthgpt::cuda {

using Stream = CUstream_st*;  // cudaStream_t
// Null for success, else what is wrong: with the arguments (nothing was launched) or, by CUDA's word, with the launch.
using Status = const char*;

enum class Storage { kFloat32, kFloat16, kBFloat16, kInt8, kInt4 };

// A matrix (channels, outputs), row by row, as the exporter writes it (export/quantize.py): int4 holds two neighbouring
// outputs per byte, the even one in the low bits; integers stand for scales(channel / block_size, output) * value.
struct Matrix {
  const void* values = nullptr;
  const float* scales = nullptr;  // (ceil(channels / block_size), outputs), null for floats
  Storage storage = Storage::kFloat16;
  int64_t channels = 0;
  int64_t outputs = 0;
  int64_t stride = 0;      // numbers from one row to the next, at least `outputs`
  int64_t block_size = 0;  // 32, 64 or 128; 0 for floats
};

constexpr int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace healthgpt::cuda
