// The input of a product: rows of floats, also quantised to bytes if the matrix holds integers.
#pragma once

#include "hlora_linear/part.h"
#include "simd/exponential.h"

namespace healthgpt {
namespace {

// to = x / sqrt(mean(x^2) + epsilon).
void NormaliseRow(const float* x, int64_t channels, float epsilon, float* to) {
  constexpr int64_t lanes = Simd::kLanes;
  constexpr int kSums = 4;  // in turn, because each addition takes a few cycles
  Floats sums[kSums];
  Unroll<kSums>([&](auto k) SIMD_INLINE_LAMBDA { sums[k] = Simd::Repeat(0.0f); });
  int64_t i = 0;
  for (; i + kSums * lanes <= channels; i += kSums * lanes) {
    Unroll<kSums>([&](auto k) SIMD_INLINE_LAMBDA {
      const Floats values = Simd::Load(x + i + k * lanes);
      sums[k] = Simd::MultiplyAdd(values, values, sums[k]);
    });
  }
  for (; i < channels; i += lanes) {
    const Floats values = Simd::Load(x + i, static_cast<int>(Min(lanes, channels - i)));
    sums[0] = Simd::MultiplyAdd(values, values, sums[0]);
  }
  const float total = Simd::Sum(Simd::Add(Simd::Add(sums[0], sums[1]), Simd::Add(sums[2], sums[3])));
  const Floats factor = Simd::Repeat(1.0f / __builtin_sqrtf(total / static_cast<float>(channels) + epsilon));
  for (i = 0; i < channels; i += lanes) {
    const int count = static_cast<int>(Min(lanes, channels - i));
    Simd::Store(to + i, Simd::Multiply(Simd::Load(x + i, count), factor), count);
  }
}

// to = swish(gate) * up.
void SwigluRow(const float* gate, const float* up, int64_t channels, float* to) {
  for (int64_t i = 0; i < channels; i += Simd::kLanes) {
    const int count = static_cast<int>(Min(Simd::kLanes, channels - i));
    Simd::Store(to + i, Simd::Multiply(Swish(Simd::Load(gate + i, count)), Simd::Load(up + i, count)), count);
  }
}

// to = x sigmoid(1.702 x).
void QuickGeluRow(const float* x, int64_t channels, float* to) {
  for (int64_t i = 0; i < channels; i += Simd::kLanes) {
    const int count = static_cast<int>(Min(Simd::kLanes, channels - i));
    Simd::Store(to + i, Swish(Simd::Load(x + i, count), 1.702f), count);
  }
}

// Rows of x. For integer matrices they are also quantised to 8 bits, block by block: block b of row r begins at
// bytes[(b * rows + r) * block_size] and is padded with zeros; scales[b * rows + r] is its scale and
// sums[b * rows + r] the sum of its bytes.
struct Input {
  const float* values;  // what products with floats read
  int64_t rows;
  int64_t channels;
  int8_t* bytes;
  float* scales;
  int32_t* sums;
};

size_t RoundedBytes(int64_t rows, const Matrix& matrix) {
  if (!IsInteger(matrix.storage)) return 0;
  return static_cast<size_t>(rows * BlocksOf(matrix) * (matrix.block_size + 8));
}

Input PlaceInput(const float* values, int64_t rows, const Matrix& matrix, void* memory) {
  Input input = {values, rows, matrix.channels, nullptr, nullptr, nullptr};
  if (IsInteger(matrix.storage)) {
    const int64_t blocks = rows * BlocksOf(matrix);
    input.scales = static_cast<float*>(memory);
    input.sums = reinterpret_cast<int32_t*>(input.scales + blocks);
    input.bytes = reinterpret_cast<int8_t*>(input.sums + blocks);
  }
  return input;
}

// Quantises one block of a row to [-127, 127]. If a value is not finite, neither is the scale, and so no result.
void RoundBlock(const float* x, int64_t channels, int64_t block_size, int8_t* bytes, float* scale, int32_t* sum) {
  constexpr int64_t lanes = Simd::kLanes;
  Floats largest = Simd::Repeat(0.0f), poison = Simd::Repeat(0.0f);
  for (int64_t i = 0; i < channels; i += lanes) {
    const Floats values = Simd::Load(x + i, static_cast<int>(Min(lanes, channels - i)));
    largest = Simd::Max(largest, Simd::Magnitude(values));
    poison = Simd::MultiplyAdd(values, Simd::Repeat(0.0f), poison);
  }
  const float range = Simd::Largest(largest);
  *scale = range / 127.0f + Simd::Sum(poison);
  const Floats inverse = Simd::Repeat(range > 1e-30f ? 127.0f / range : 0.0f);
  Floats total = Simd::Repeat(0.0f);  // a sum of integers is exact in any order
  for (int64_t i = 0; i < block_size; i += lanes) {
    const int count = static_cast<int>(Max(0, Min(lanes, channels - i)));
    const Floats values = Simd::Multiply(Simd::Load(x + i, count), inverse);
    total = Simd::Add(total, Simd::Round(values));
    if (i + lanes <= block_size) {
      Simd::StoreRounded(bytes + i, values);
      continue;
    }
    int8_t rounded[lanes];
    Simd::StoreRounded(rounded, values);
    for (int64_t j = i; j < block_size; ++j) bytes[j] = rounded[j - i];
  }
  const float whole = Simd::Sum(total);
  *sum = whole == whole ? static_cast<int32_t>(whole) : 0;  // NaN is in the scale as well
}

// Quantises one row of `values` for a matrix of integers.
void RoundRow(const Input& input, const Matrix& matrix, int64_t row, const float* values) {
  if (!IsInteger(matrix.storage)) return;
  const int64_t size = matrix.block_size, blocks = BlocksOf(matrix);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t at = block * input.rows + row, first = block * size;
    RoundBlock(values + first, Min(size, input.channels - first), size, input.bytes + at * size, input.scales + at,
               input.sums + at);
  }
}

}  // namespace
}  // namespace healthgpt
