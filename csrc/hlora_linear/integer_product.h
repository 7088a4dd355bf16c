// Products with int8 and int4 matrices: x is rounded to bytes, sums within a block are exact.
#pragma once

#include "hlora_linear/input.h"
#include "hlora_linear/part.h"

namespace healthgpt {
namespace {

// Bytes of one row of a tile in the file.
template <Storage storage>
constexpr int64_t TileBytes() {
  return storage == Storage::kInt4 ? kTile / 2 : kTile;
}

// Bytes of a row of `outputs` outputs, an even number for int4.
template <Storage storage>
constexpr int64_t RowBytes(int64_t outputs) {
  return storage == Storage::kInt4 ? outputs / 2 : outputs;
}

// Four channels of a tile will be wanted soon.
template <Storage storage>
SIMD_INLINE void FetchChannels(const uint8_t* from, int64_t stride) {
  for (int64_t i = 0; i < 4; ++i) {
    for (int64_t line = 0; line < TileBytes<storage>(); line += 64) __builtin_prefetch(from + i * stride + line, 0, 2);
  }
}

// Four channels of a tile to eight vectors, each with four channels of kLanes outputs, in the order of Interleave:
// use(Constant<i>, vector i). Unless it is known to be kWhole, channels from `channels` on are zero, and so are outputs
// from `columns` on.
template <Storage storage, bool kWhole, class Use>
SIMD_INLINE void LoadChannels(const uint8_t* from, int64_t stride, int64_t channels, int columns, const Use& use) {
  constexpr int parts = storage == Storage::kInt4 ? 1 : 2;
  constexpr int width = 4 * Simd::kLanes;
  Unroll<parts>([&](auto part) SIMD_INLINE_LAMBDA {
    Bytes rows[4];
    const int bytes = (storage == Storage::kInt4 ? (columns + 1) / 2 : columns) - part * width;
    Unroll<4>([&](auto i) SIMD_INLINE_LAMBDA {
      const uint8_t* row = from + i * stride + part * width;
      if (kWhole) {
        rows[i] = Simd::LoadBytes(row);
      } else {
        rows[i] = i < channels ? Simd::LoadBytes(row, bytes > 0 ? bytes : 0) : Simd::NoBytes();
      }
      rows[i] = storage == Storage::kInt4 ? Simd::Shift4(rows[i]) : Simd::Shift8(rows[i]);
    });
    Simd::Interleave(rows);
    Unroll<4>([&](auto i) SIMD_INLINE_LAMBDA {
      if constexpr (storage == Storage::kInt4) {
        use(Constant<2 * i.value>{}, Simd::EvenNibbles(rows[i]));
        use(Constant<2 * i.value + 1>{}, Simd::OddNibbles(rows[i]));
      } else {
        use(Constant<4 * part.value + i.value>{}, rows[i]);
      }
    });
  });
}

// Eight vectors in the order of LoadChannels, to that of columns.
template <Storage storage>
SIMD_INLINE void OrderColumns(Ints (&vectors)[kVectors]) {
  if constexpr (storage == Storage::kInt4) {
    Simd::Order4(vectors);
  } else {
    Simd::Order8(vectors);
  }
}

// A row of int4 with an odd number of outputs starts inside a byte for every other channel: one value at a time.
void LoadOddChannels(const uint8_t* from, int64_t first, int64_t stride, int64_t channels, int columns, int32_t* tile) {
  for (int64_t channel = 0; channel < 4; ++channel) {
    for (int64_t column = 0; column < kTile; ++column) {
      const int64_t at = first + channel * stride + column;
      const bool inside = channel < channels && column < columns;
      const int nibble = inside ? from[at / 2] >> (at % 2 * 4) & 0x0F : 0;
      reinterpret_cast<uint8_t*>(tile)[column * 4 + channel] = static_cast<uint8_t>((nibble ^ 8) - 8 + Simd::kOffset4);
    }
  }
}

// Dot products of kRows rows of x with a tile, of weights in the order of Interleave or of columns.
template <Storage storage, int kRows>
struct Products {
  Ints at[kRows][kVectors];
  Bytes x[kRows];

  SIMD_INLINE void Start(const int32_t* x_sums) {
    constexpr int offset = storage == Storage::kInt4 ? Simd::kOffset4 : Simd::kOffset8;
    Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
      const Ints start = Simd::RepeatInt(-offset * x_sums[r]);
      Unroll<kVectors>([&](auto i) SIMD_INLINE_LAMBDA { at[r][i] = start; });
    });
  }
  SIMD_INLINE void Load(const int32_t* from, int64_t stride) {
    Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
      Unroll<kVectors>([&](auto i)
                           SIMD_INLINE_LAMBDA { at[r][i] = Simd::LoadInts(from + r * stride + i * Simd::kLanes); });
    });
  }
  SIMD_INLINE void Store(int32_t* to, int64_t stride) const {
    Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
      Unroll<kVectors>([&](auto i)
                           SIMD_INLINE_LAMBDA { Simd::StoreInts(to + r * stride + i * Simd::kLanes, at[r][i]); });
    });
  }
  SIMD_INLINE void LoadX(const int8_t* from, int64_t stride) {
    Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA { x[r] = Simd::Repeat4(from + r * stride); });
  }
  template <int i>
  SIMD_INLINE void Add(Bytes weights) {
    Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
      at[r][i] = storage == Storage::kInt4 ? Simd::Dot4(at[r][i], weights, x[r]) : Simd::Dot8(at[r][i], weights, x[r]);
      SIMD_KEEP(at[r][i]);
    });
  }
  SIMD_INLINE void Order() {
    Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA { OrderColumns<storage>(at[r]); });
  }
  SIMD_INLINE void AddTo(float* sums, int64_t stride, const float* scales, const float* x_scales) {
    Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
      const Floats x_scale = Simd::Repeat(x_scales[r]);
      Unroll<kVectors>([&](auto i) SIMD_INLINE_LAMBDA {
        float* sum = sums + r * stride + i * Simd::kLanes;
        const Floats scale = Simd::Multiply(x_scale, Simd::Load(scales + i * Simd::kLanes));
        Simd::Store(sum, Simd::MultiplyAdd(Simd::ToFloats(at[r][i]), scale, Simd::Load(sum)));
      });
    });
  }
};

// The scales of a tile; past the last output, `padded` with zeros.
SIMD_INLINE const float* TileScales(const Matrix& matrix, const Part& part, int64_t block, int64_t tile,
                                    float* padded) {
  const float* scales = matrix.scales + block * matrix.outputs + part.column + tile * kTile;
  const int columns = TileColumns(part, tile);
  if (columns == kTile) return scales;
  for (int64_t i = 0; i < kTile; ++i) padded[i] = i < columns ? scales[i] : 0.0f;
  return padded;
}

// Adds the products of eight channels from `channel` on, or those left, with a tile to those waiting.
template <Storage storage, int kRows, bool kWhole>
SIMD_INLINE void AddChannels(const uint8_t* from, int64_t stride, int64_t channels, int columns, const int8_t* x,
                             int64_t x_stride, const int32_t* x_sums, int32_t* waiting, int64_t waiting_stride) {
  Products<storage, kRows> products;
  if (x_sums != nullptr) {
    products.Start(x_sums);
  } else {
    products.Load(waiting, waiting_stride);
  }
  const auto add = [&](auto i, Bytes weights) SIMD_INLINE_LAMBDA { products.template Add<i.value>(weights); };
  FetchChannels<storage>(from + kChannelsAhead * stride, stride);
  products.LoadX(x, x_stride);
  LoadChannels<storage, kWhole>(from, stride, channels, columns, add);
  if (kWhole || channels > 4) {
    FetchChannels<storage>(from + (kChannelsAhead + 4) * stride, stride);
    products.LoadX(x + 4, x_stride);
    LoadChannels<storage, kWhole>(from + 4 * stride, stride, channels - 4, columns, add);
  }
  products.Store(waiting, waiting_stride);
}

// sums += block `block` times kRows rows, read as the file lies.
template <Storage storage, int kRows>
void AddBlockInPlace(const Matrix& matrix, const Input& input, int64_t block, const Part& part) {
  const int64_t size = matrix.block_size, channels = Min(size, matrix.channels - block * size);
  const int64_t stride = RowBytes<storage>(matrix.outputs), tiles = part.stride / kTile;
  const int64_t first = block * input.rows + part.row;
  const int8_t* x = input.bytes + first * size;
  const uint8_t* values =
      static_cast<const uint8_t*>(matrix.values) + block * size * stride + RowBytes<storage>(part.column);
  int32_t* waiting = static_cast<int32_t*>(part.unpacked);
  for (int64_t channel = 0; channel < channels; channel += 8) {
    const int32_t* x_sums = channel == 0 ? input.sums + first : nullptr;
    const uint8_t* from = values + channel * stride;
    int64_t tile = 0;
    if (channel + 8 <= channels) {
      for (; tile < part.columns / kTile; ++tile) {
        AddChannels<storage, kRows, true>(from + tile * TileBytes<storage>(), stride, 8, kTile, x + channel, size,
                                          x_sums, waiting + tile * kTile, part.stride);
      }
    }
    for (; tile < tiles; ++tile) {
      AddChannels<storage, kRows, false>(from + tile * TileBytes<storage>(), stride, channels - channel,
                                         TileColumns(part, tile), x + channel, size, x_sums, waiting + tile * kTile,
                                         part.stride);
    }
  }
  for (int64_t tile = 0; tile < tiles; ++tile) {
    float padded[kTile];
    Products<storage, kRows> products;
    products.Load(waiting + tile * kTile, part.stride);
    products.Order();
    products.AddTo(part.sums + tile * kTile, part.stride, TileScales(matrix, part, block, tile, padded),
                   input.scales + first);
  }
}

// The channels of a block for all tiles of the part, tile after tile: each 32-bit integer has four channels of a
// column.
template <Storage storage>
void UnpackBlock(const Matrix& matrix, int64_t block, const Part& part) {
  const int64_t size = matrix.block_size, channels = Min(size, matrix.channels - block * size);
  const uint8_t* values = static_cast<const uint8_t*>(matrix.values);
  for (int64_t channel = 0; channel < channels; channel += 4) {
    for (int64_t tile = 0; tile < part.stride / kTile; ++tile) {
      int32_t* to = static_cast<int32_t*>(part.unpacked) + (tile * size + channel) / 4 * kTile;
      const int64_t row = block * size + channel, column = part.column + tile * kTile;
      if (storage == Storage::kInt4 && matrix.outputs % 2 != 0) {
        LoadOddChannels(values, row * matrix.outputs + column, matrix.outputs, channels - channel,
                        TileColumns(part, tile), to);
        continue;
      }
      const int64_t stride = RowBytes<storage>(matrix.outputs);
      const uint8_t* from = values + row * stride + RowBytes<storage>(column);
      FetchChannels<storage>(from + kChannelsAhead * stride, stride);
      Ints weights[kVectors];
      const auto keep = [&](auto i, Bytes loaded) SIMD_INLINE_LAMBDA { weights[i] = Simd::AsInts(loaded); };
      const int columns = TileColumns(part, tile);
      if (columns == kTile && channel + 4 <= channels) {
        LoadChannels<storage, true>(from, stride, 4, kTile, keep);
      } else {
        LoadChannels<storage, false>(from, stride, channels - channel, columns, keep);
      }
      OrderColumns<storage>(weights);
      Unroll<kVectors>([&](auto i) SIMD_INLINE_LAMBDA { Simd::StoreInts(to + i * Simd::kLanes, weights[i]); });
    }
  }
}

// sums += an unpacked tile times kRows rows from part.row + row on.
template <Storage storage, int kRows>
void AddUnpackedTile(const Matrix& matrix, const Input& input, int64_t block, const Part& part, int64_t row,
                     int64_t tile, const float* scales) {
  const int64_t size = matrix.block_size, channels = Min(size, matrix.channels - block * size);
  const int64_t first = block * input.rows + part.row + row;
  const int8_t* x = input.bytes + first * size;
  const uint8_t* weights = static_cast<const uint8_t*>(part.unpacked) + tile * size * kTile;
  Products<storage, kRows> products;
  products.Start(input.sums + first);
  for (int64_t channel = 0; channel < channels; channel += 4) {
    products.LoadX(x + channel, size);
    Unroll<kVectors>([&](auto i) SIMD_INLINE_LAMBDA {
      products.template Add<i.value>(Simd::LoadBytes(weights + channel * kTile + i * 4 * Simd::kLanes));
    });
  }
  products.AddTo(part.sums + row * part.stride + tile * kTile, part.stride, scales, input.scales + first);
}

template <Storage storage>
void AddIntegerProduct(const Matrix& matrix, const Input& input, int64_t first_block, int64_t end_block,
                       const Part& part) {
  const bool odd = storage == Storage::kInt4 && matrix.outputs % 2 != 0;
  for (int64_t block = first_block; block < end_block; ++block) {
    if (part.rows <= kFewRows && !odd) {
      const auto add =
          Pick(part.rows, AddBlockInPlace<storage, 1>, AddBlockInPlace<storage, 2>, AddBlockInPlace<storage, 3>);
      add(matrix, input, block, part);
      continue;
    }
    UnpackBlock<storage>(matrix, block, part);
    for (int64_t tile = 0; tile < part.stride / kTile; ++tile) {
      float padded[kTile];
      const float* scales = TileScales(matrix, part, block, tile, padded);
      for (int64_t row = 0; row < part.rows; row += kRowsAtOnce) {
        const auto add = Pick(part.rows - row, AddUnpackedTile<storage, 1>, AddUnpackedTile<storage, 2>,
                              AddUnpackedTile<storage, 3>);
        add(matrix, input, block, part, row, tile, scales);
      }
    }
  }
}

}  // namespace
}  // namespace healthgpt
