// Products with float32, float16 and bfloat16 matrices: one float32 sum per output, in the order of the channels.
#pragma once

#include "hlora_linear/input.h"
#include "hlora_linear/part.h"

namespace healthgpt {
namespace {

template <Storage storage>
SIMD_INLINE Floats LoadFloats(const void* values, int64_t at, int count) {
  if constexpr (storage == Storage::kFloat32) {
    return Simd::Load(static_cast<const float*>(values) + at, count);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(values) + at;
    return storage == Storage::kFloat16 ? Simd::LoadHalf(from, count) : Simd::LoadBFloat16(from, count);
  }
}

// Vectors of sums per row, so that `rows` rows leave registers for weights and factors.
constexpr int SumsPerRow(int rows) {
  const int most = Simd::kRegisters * 3 / 4 / rows;
  return most >= kVectors ? kVectors : most >= 4 ? 4 : 2;
}

// What to prefetch: rows of a tile, `stride` bytes apart. With a null `from`, nothing.
struct Ahead {
  const char* from;
  int64_t stride;
  int64_t bytes;  // of a row
};

// Adds `channels` channels of a tile times kRows rows of x to the sums at `place`. The tile's first number is
// values[at].
template <Storage storage, int kRows>
void MultiplyFloats(const void* values, int64_t at, int64_t stride, int64_t channels, const float* x, int64_t x_stride,
                    const Ahead& ahead, const Sums& sums, int64_t place, int64_t sums_stride) {
  constexpr int kSums = SumsPerRow(kRows);
  for (int64_t vector = 0; vector < kVectors; vector += kSums) {
    const int64_t first = vector * Simd::kLanes, fetched = ahead.bytes * vector / kVectors;
    Floats totals[kRows][kSums];
    const auto each = [&](const auto& use) SIMD_INLINE_LAMBDA {
      Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
        Unroll<kSums>(
            [&](auto i) SIMD_INLINE_LAMBDA { use(totals[r][i], place + r * sums_stride + first + i * Simd::kLanes); });
      });
    };
    if (sums.from == nullptr) {
      each([&](Floats& total, int64_t) SIMD_INLINE_LAMBDA { total = Simd::Repeat(0.0f); });
    } else {
      each([&](Floats& total, int64_t index) SIMD_INLINE_LAMBDA { total = Simd::Load(sums.from + index); });
    }
    for (int64_t channel = 0; channel < channels; ++channel) {
      if (ahead.from != nullptr) {
        const char* next = ahead.from + channel * ahead.stride + fetched;
        for (int64_t line = 0; line < ahead.bytes * kSums / kVectors; line += 64) __builtin_prefetch(next + line, 0, 2);
      }
      Floats weights[kSums];
      Unroll<kSums>([&](auto i) SIMD_INLINE_LAMBDA {
        weights[i] = LoadFloats<storage>(values, at + channel * stride + first + i * Simd::kLanes, Simd::kLanes);
      });
      Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
        const Floats factor = Simd::Repeat(x[r * x_stride + channel]);
        Unroll<kSums>([&](auto i) SIMD_INLINE_LAMBDA {
          totals[r][i] = Simd::MultiplyAdd(factor, weights[i], totals[r][i]);
          SIMD_KEEP(totals[r][i]);
        });
      });
    }
    if (sums.before != nullptr) {
      each([&](Floats& total, int64_t index)
               SIMD_INLINE_LAMBDA { total = Simd::Add(Simd::Load(sums.before + index), total); });
    }
    each([&](Floats& total, int64_t index) SIMD_INLINE_LAMBDA { Simd::Store(sums.to + index, total); });
  }
}

// MultiplyFloats for `rows` rows, at most kFloatRowsAtOnce; of what is read in place and not float32, few.
template <Storage storage>
SIMD_INLINE auto FloatMultiplier(int64_t rows) {
  if constexpr (storage == Storage::kFloat32) {
    return Pick(rows, MultiplyFloats<storage, 1>, MultiplyFloats<storage, 2>, MultiplyFloats<storage, 3>,
                MultiplyFloats<storage, 4>, MultiplyFloats<storage, 5>, MultiplyFloats<storage, 6>);
  } else {
    return Pick(rows, MultiplyFloats<storage, 1>, MultiplyFloats<storage, 2>, MultiplyFloats<storage, 3>);
  }
}

// Converts channels of a tile to float32 (channels, kTile), with zeros past the last output.
template <Storage storage>
void Widen(const void* values, int64_t at, int64_t stride, int64_t channels, int columns, float* to) {
  for (int64_t channel = 0; channel < channels; ++channel, at += stride, to += kTile) {
    if (columns == kTile) {
      Unroll<kVectors>([&](auto i) SIMD_INLINE_LAMBDA {
        Simd::Store(to + i * Simd::kLanes, LoadFloats<storage>(values, at + i * Simd::kLanes, Simd::kLanes));
      });
      continue;
    }
    for (int i = 0; i < kTile; i += Simd::kLanes) {
      Simd::Store(to + i, i < columns ? LoadFloats<storage>(values, at + i, columns - i) : Simd::Repeat(0.0f));
    }
  }
}

// Few rows go over all tiles four channels at a time (integers: eight). More rows go over them one block of channels at
// a time, widened to float32. What is float32 is read in place: always by up to kFloatRowsInPlace rows, which read it
// once or twice, and by more rows unless its channels are a multiple of 4 KiB apart, where they share one set of the L1
// cache.
template <Storage storage>
void AddFloatBlocks(const Matrix& matrix, const Input& input, int64_t first_block, int64_t end_block, const Part& part,
                    bool added) {
  constexpr int64_t bytes = storage == Storage::kFloat32 ? 4 : 2;
  const char* values = static_cast<const char*>(matrix.values);
  const int64_t end = Min(end_block * kFloatBlock, matrix.channels), tiles = part.stride / kTile;
  const bool few = part.rows <= FewRows(storage), apart = matrix.outputs * bytes % 4096 != 0;
  const bool lies_well = few || (storage == Storage::kFloat32 && (part.rows <= kFloatRowsInPlace || apart));
  const int64_t step = few ? 4 : kFloatBlock;
  for (int64_t channel = first_block * kFloatBlock; channel < end; channel += step) {
    const int64_t channels = Min(step, end - channel);
    const Sums sums = SumsOf(part, channel == first_block * kFloatBlock, channel + step >= end, added);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int columns = TileColumns(part, tile);
      const int64_t at = channel * matrix.outputs + part.column + tile * kTile;
      const bool in_place = lies_well && columns == kTile;
      // Next come, for few rows, four more channels of this tile. Otherwise it is the tile to the right; after the last
      // tile the first one of the next block, or of the next part.
      const bool below = channel + kFloatBlock < matrix.channels;
      const int64_t beside = tile + 1 < tiles ? at + kTile
                             : below          ? at + kFloatBlock * matrix.outputs - tile * kTile
                                              : part.column + part.columns;
      const int64_t next = in_place && few ? at + 4 * matrix.outputs : beside;
      Ahead ahead = {values + next * bytes, matrix.outputs * bytes, kTile * bytes};
      float* widened = static_cast<float*>(part.unpacked);
      if (!in_place) Widen<storage>(matrix.values, at, matrix.outputs, channels, columns, widened);
      for (int64_t row = 0; row < part.rows; row += kFloatRowsAtOnce) {
        const int64_t left = part.rows - row;
        const float* x = input.values + (part.row + row) * input.channels + channel;
        const int64_t place = row * part.stride + tile * kTile;
        if (in_place) {
          FloatMultiplier<storage>(left)(matrix.values, at, matrix.outputs, channels, x, input.channels, ahead, sums,
                                         place, part.stride);
        } else {
          FloatMultiplier<Storage::kFloat32>(left)(widened, 0, kTile, channels, x, input.channels, ahead, sums, place,
                                                   part.stride);
        }
        ahead.from = nullptr;  // the first rows have prefetched it
      }
    }
  }
}

template <Storage storage>
void AddFloatProduct(const Matrix& matrix, const Input& input, const Splits& splits, const Part& part, bool added) {
  splits.Each([&](int64_t block, int64_t end, bool first) {
    AddFloatBlocks<storage>(matrix, input, block, end, part, added || !first);
  });
}

}  // namespace
}  // namespace healthgpt
