// Products with float32 and float16 matrices: one float32 sum per output, channel after channel.
#pragma once

#include "hlora_linear/input.h"
#include "hlora_linear/part.h"

namespace healthgpt {
namespace {

template <Storage storage>
SIMD_INLINE Floats LoadFloats(const void* values, int64_t at, int count) {
  if (storage == Storage::kFloat16) {
    const uint16_t* from = static_cast<const uint16_t*>(values) + at;
    return count >= Simd::kLanes ? Simd::LoadHalf(from) : Simd::LoadHalf(from, count);
  }
  const float* from = static_cast<const float*>(values) + at;
  return count >= Simd::kLanes ? Simd::Load(from) : Simd::Load(from, count);
}

// sums += the tile's `channels` channels, whose first number is at `at` of values, times kRows rows of x. Fetches what
// lies `ahead` channels further.
template <Storage storage, int kRows>
void MultiplyFloats(const void* values, int64_t at, int64_t stride, int64_t channels, const float* x, int64_t x_stride,
                    int64_t ahead, float* sums, int64_t sums_stride) {
  Floats totals[kRows][kVectors];
  Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
    Unroll<kVectors>([&](auto i)
                         SIMD_INLINE_LAMBDA { totals[r][i] = Simd::Load(sums + r * sums_stride + i * Simd::kLanes); });
  });
  constexpr int64_t bytes = storage == Storage::kFloat16 ? 2 : 4;
  for (int64_t channel = 0; channel < channels; ++channel) {
    if (ahead != 0) {
      const char* next = static_cast<const char*>(values) + (at + (channel + ahead) * stride) * bytes;
      for (int64_t line = 0; line < kTile * bytes; line += 64) __builtin_prefetch(next + line);
    }
    Floats factors[kRows];
    Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA { factors[r] = Simd::Repeat(x[r * x_stride + channel]); });
    Unroll<kVectors>([&](auto i) SIMD_INLINE_LAMBDA {
      const Floats weights = LoadFloats<storage>(values, at + channel * stride + i * Simd::kLanes, Simd::kLanes);
      Unroll<kRows>([&](auto r)
                        SIMD_INLINE_LAMBDA { totals[r][i] = Simd::MultiplyAdd(factors[r], weights, totals[r][i]); });
    });
  }
  Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
    Unroll<kVectors>([&](auto i)
                         SIMD_INLINE_LAMBDA { Simd::Store(sums + r * sums_stride + i * Simd::kLanes, totals[r][i]); });
  });
}

// Few rows go over all tiles four channels at a time, as integers do with eight; more rows take widened tiles of a
// block.
template <Storage storage>
void AddFloatProduct(const Matrix& matrix, const Input& input, int64_t first_block, int64_t end_block,
                     const Part& part) {
  const int64_t end = Min(end_block * kFloatBlock, matrix.channels);
  const bool few = part.rows <= kFewRows;
  const int64_t step = few ? 4 : kFloatBlock;
  for (int64_t channel = first_block * kFloatBlock; channel < end; channel += step) {
    const int64_t channels = Min(step, end - channel);
    for (int64_t tile = 0; tile < part.stride / kTile; ++tile) {
      const int columns = TileColumns(part, tile);
      const int64_t at = channel * matrix.outputs + part.column + tile * kTile;
      const bool in_place = few && columns == kTile;
      float* widened = static_cast<float*>(part.unpacked);
      if (!in_place) {
        for (int64_t i = 0; i < channels; ++i) {
          for (int64_t j = 0; j < kTile; j += Simd::kLanes) {
            const int count = static_cast<int>(columns - j);
            const int64_t from = at + i * matrix.outputs + j;
            Simd::Store(widened + i * kTile + j,
                        count > 0 ? LoadFloats<storage>(matrix.values, from, count) : Simd::Repeat(0.0f));
          }
        }
      }
      for (int64_t row = 0; row < part.rows; row += kRowsAtOnce) {
        const int64_t left = part.rows - row;
        const float* x = input.values + (part.row + row) * input.channels + channel;
        float* sums = part.sums + row * part.stride + tile * kTile;
        if (in_place) {
          const auto multiply =
              Pick(left, MultiplyFloats<storage, 1>, MultiplyFloats<storage, 2>, MultiplyFloats<storage, 3>);
          multiply(matrix.values, at, matrix.outputs, channels, x, input.channels, 4, sums, part.stride);
        } else {
          const auto multiply = Pick(left, MultiplyFloats<Storage::kFloat32, 1>, MultiplyFloats<Storage::kFloat32, 2>,
                                     MultiplyFloats<Storage::kFloat32, 3>);
          multiply(widened, 0, kTile, channels, x, input.channels, 0, sums, part.stride);
        }
      }
    }
  }
}

}  // namespace
}  // namespace healthgpt
