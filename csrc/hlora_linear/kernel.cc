// The kernels of HLoraLinear, compiled once per target. Nothing here may be shared between these compilations, so all
// is in the anonymous namespace and no header of the standard library with inline code is used.
//
// A matrix is worked through in tiles of kTile outputs, whose sums for up to three rows fill the registers: eight
// vectors per row. There are two ways through it:
//   few rows    Bytes are the limit. The file is read as it lies, four channels at a time over all tiles of the task,
//               and the sums of all its tiles wait in the first cache.
//   more rows   Arithmetic is. A block of channels is unpacked once into the second cache; a tile's sums then stay in
//               registers for the whole block.
// (Going down one tile of the file for a whole block, in place, would touch a page per channel, and channels that are a
// multiple of 4096 bytes apart would push each other out of the first cache.)
// Integer sums are exact, and float sums of a row always go block by block in order: hence both give the same bits.
#include "hlora_linear/target_kernels.h"
#include "scratch.h"
#include "simd/simd.h"

namespace healthgpt {
namespace {

using Bytes = Simd::Bytes;
using Ints = Simd::Ints;
using Floats = Simd::Floats;

constexpr int64_t kVectors = 8;                     // of sums per row
constexpr int64_t kTile = kVectors * Simd::kLanes;  // outputs
constexpr int64_t kRowsAtOnce = 3;                  // 24 of 32 registers hold their sums
constexpr int64_t kFewRows = 3;
constexpr int64_t kFloatBlock = 64;        // channels of a tile of floats
constexpr int64_t kChannelsAhead = 16;     // fetched before they are read
constexpr int64_t kTaskBytes = 384 << 10;  // of a task's sums and unpacked block, to stay in the second cache
constexpr int64_t kRowsPerTask = 384;
constexpr int64_t kRunColumns = 8192;   // of a run for few rows: their sums fill the first cache
constexpr int64_t kPartsPerMatrix = 8;  // at least, where it is large enough
constexpr int64_t kRowsInline = 8;      // as many rows or fewer are rounded without calling the pool

int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t b) { return CeilDivide(a, b) * b; }

bool IsInteger(Storage storage) { return storage == Storage::kInt4 || storage == Storage::kInt8; }
int64_t BlockOf(const Matrix& matrix) { return IsInteger(matrix.storage) ? matrix.block_size : kFloatBlock; }
int64_t BlocksOf(const Matrix& matrix) { return CeilDivide(matrix.channels, BlockOf(matrix)); }

// --- what a matrix is multiplied with ---------------------------------------------------------------------------

// Rows of x; for integer matrices also rounded to 8 bits, block by block: block b of row r is at
// bytes[(b * rows + r) * block_size], filled up with zeros, worth scales[b * rows + r] each; sums are those of the
// bytes.
struct Input {
  const float* values;
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

// One block of one row to bytes in [-127, 127]. What is not finite makes the scale, and so the results, not finite.
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
  for (int64_t i = 0; i < block_size; i += lanes) {
    const int count = static_cast<int>(Max(0, Min(lanes, channels - i)));
    const Floats values = Simd::Multiply(Simd::Load(x + i, count), inverse);
    if (i + lanes <= block_size) {
      Simd::StoreRounded(bytes + i, values);
      continue;
    }
    int8_t rounded[lanes];
    Simd::StoreRounded(rounded, values);
    for (int64_t j = i; j < block_size; ++j) bytes[j] = rounded[j - i];
  }
  int32_t total = 0;
  for (int64_t i = 0; i < block_size; ++i) total += bytes[i];
  *sum = total;
}

void RoundRow(const Input& input, const Matrix& matrix, int64_t row) {
  if (!IsInteger(matrix.storage)) return;
  const int64_t size = matrix.block_size, blocks = BlocksOf(matrix);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t at = block * input.rows + row, first = block * size;
    RoundBlock(input.values + row * input.channels + first, Min(size, input.channels - first), size,
               input.bytes + at * size, input.scales + at, input.sums + at);
  }
}

// --- a tile of integers -----------------------------------------------------------------------------------------

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

// --- a tile of floats -------------------------------------------------------------------------------------------

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

// --- a part of a product ----------------------------------------------------------------------------------------

// What a task works on: rows and outputs (a multiple of kTile but at the matrix' end), and its memory.
struct Part {
  int64_t row, rows, column, columns;
  int64_t stride;  // columns, rounded up to whole tiles
  float* sums;     // (rows, stride)
  void* unpacked;  // a block of channels of all tiles, or (kFewRows, stride) integers
};

// Outputs of a tile that exist.
SIMD_INLINE int TileColumns(const Part& part, int64_t tile) {
  return static_cast<int>(Min(kTile, part.columns - tile * kTile));
}

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

// As for integers: few rows go four channels at a time over all tiles, more rows take widened tiles of a block.
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

void AddProduct(const Matrix& matrix, const Input& input, int64_t first_block, int64_t end_block, const Part& part) {
  switch (matrix.storage) {
    case Storage::kFloat32:
      return AddFloatProduct<Storage::kFloat32>(matrix, input, first_block, end_block, part);
    case Storage::kFloat16:
      return AddFloatProduct<Storage::kFloat16>(matrix, input, first_block, end_block, part);
    case Storage::kInt8:
      return AddIntegerProduct<Storage::kInt8>(matrix, input, first_block, end_block, part);
    case Storage::kInt4:
      return AddIntegerProduct<Storage::kInt4>(matrix, input, first_block, end_block, part);
  }
}

// --- the whole linear -------------------------------------------------------------------------------------------

// low (R + E): A x, then the router's logits. Each expert owns R / E neighbouring entries of A x and scales them by
// its share of the softmax.
void ApplyGate(float* low, int64_t rank, int64_t experts) {
  float* routes = low + rank;
  float largest = routes[0], total = 0.0f;
  for (int64_t expert = 1; expert < experts; ++expert) largest = routes[expert] > largest ? routes[expert] : largest;
  for (int64_t expert = 0; expert < experts; ++expert) {
    routes[expert] = __builtin_expf(routes[expert] - largest);
    total += routes[expert];
  }
  const int64_t width = rank / experts;
  for (int64_t expert = 0; expert < experts; ++expert) {
    const float gate = routes[expert] / total;
    for (int64_t i = 0; i < width; ++i) low[expert * width + i] *= gate;
  }
}

// Memory handed out piece by piece; from a null start it only counts.
struct Pieces {
  uintptr_t start;
  size_t used = 0;
  template <class Type>
  Type* Take(size_t bytes) {
    Type* piece = reinterpret_cast<Type*>(start + used);
    used += (bytes + 63) / 64 * 64;
    return piece;
  }
};

// How a product is cut, by its shape alone: the sums of a split of the channels are made apart and added in order, so a
// row gets the same bits whoever computes them. For few rows the splits are what threads share: each then reads a run
// of the file that is as long as the sums it keeps in the first cache allow. (Prefetchers run past the end of a short
// run, into what another thread reads.)
struct Cut {
  int64_t columns;  // of a run
  int64_t runs;     // side by side
  int64_t splits;
  int64_t blocks;

  explicit Cut(const Matrix& matrix) {
    blocks = BlocksOf(matrix);
    runs = CeilDivide(matrix.outputs, kRunColumns);
    columns = RoundUp(CeilDivide(matrix.outputs, runs), kTile);
    runs = CeilDivide(matrix.outputs, columns);
    splits = Min(blocks, Max(1, kPartsPerMatrix / runs));
  }
  int64_t first_block(int64_t split) const { return blocks * split / splits; }
};

// Bytes that a task unpacks to, per output.
int64_t UnpackedBytes(const Matrix& matrix, int64_t rows) {
  if (!IsInteger(matrix.storage)) return kFloatBlock * 4;
  const bool in_place = rows <= kFewRows && (matrix.storage == Storage::kInt8 || matrix.outputs % 2 == 0);
  return in_place ? kFewRows * 4 : matrix.block_size;
}

void Clear(float* sums, int64_t count) {
  for (int64_t i = 0; i < count; i += Simd::kLanes) Simd::Store(sums + i, Simd::Repeat(0.0f));
}

// `sums` cleared, and `extra` more floats per row and output behind them.
Part TaskPart(int64_t row, int64_t rows, int64_t column, int64_t columns, int64_t unpacked_bytes, int64_t extra = 0) {
  const int64_t stride = RoundUp(columns, kTile), sums = rows * stride;
  const int64_t bytes = sums * (1 + extra) * static_cast<int64_t>(sizeof(float)) + stride * unpacked_bytes;
  float* memory = static_cast<float*>(ScratchMemory(Scratch::kTask, static_cast<size_t>(bytes)));
  Clear(memory, sums);
  return {row, rows, column, columns, stride, memory, memory + sums * (1 + extra)};
}

// Calls task(row) for all rows, by the pool where it pays.
template <class Function>
void ForRows(int64_t rows, const Parallel& parallel, Function task) {
  if (rows <= kRowsInline) {
    for (int64_t row = 0; row < rows; ++row) task(row);
    return;
  }
  const int64_t groups = CeilDivide(rows, kRowsInline);
  parallel(static_cast<size_t>(groups), [&](size_t group) {
    const int64_t first = static_cast<int64_t>(group) * kRowsInline;
    for (int64_t row = first; row < Min(first + kRowsInline, rows); ++row) task(row);
  });
}

// One call: what it is given, and its working memory.
struct Call {
  const HLoraLinearArguments& given;
  const Parallel& parallel;
  int64_t rows, rank, low_size;
  Cut into, weight;
  Input x = {}, x_into = {}, z = {};  // x as W and as [A;R] take it; the gated A x
  float* low = nullptr;               // (splits of [A;R], rows, R + E); Gate adds them up in the first
  float* partial = nullptr;           // (splits of W, rows, O), only for few rows

  bool has_adapter() const { return given.experts > 0; }

  // The sums of one split of [A;R] for some rows.
  void Reduce(int64_t split, int64_t row, int64_t count) const {
    const Matrix& matrix = given.adapter_in;
    const Part part = TaskPart(row, count, 0, low_size, UnpackedBytes(matrix, count));
    AddProduct(matrix, x_into, into.first_block(split), into.first_block(split + 1), part);
    for (int64_t r = 0; r < count; ++r) {
      float* to = low + (split * rows + row + r) * low_size;
      for (int64_t i = 0; i < low_size; ++i) to[i] = part.sums[r * part.stride + i];
    }
  }

  // Adds the splits of [A;R], applies the gate, and rounds the result for B.
  void Gate(int64_t row) const {
    float* total = low + row * low_size;
    for (int64_t split = 1; split < into.splits; ++split) {
      const float* more = low + (split * rows + row) * low_size;
      for (int64_t i = 0; i < low_size; ++i) total[i] += more[i];
    }
    ApplyGate(total, rank, given.experts);
    float* gated = const_cast<float*>(z.values) + row * rank;
    for (int64_t i = 0; i < rank; ++i) gated[i] = total[i];
    RoundRow(z, given.adapter_out, row);
  }

  // y = the sums of W's splits, then those of B, then the bias: part.sums are B's, `product(row)` are W's.
  template <class Product>
  void Finish(const Part& part, const Product& product) const {
    const int64_t outputs = given.weight.outputs;
    for (int64_t r = 0; r < part.rows; ++r) {
      const float* expansion = part.sums + r * part.stride;
      float* to = given.y + (part.row + r) * outputs + part.column;
      for (int64_t i = 0; i < part.columns; i += Simd::kLanes) {
        const int left = static_cast<int>(Min(Simd::kLanes, part.columns - i));
        Floats sum = product(r, i, left);
        if (has_adapter()) sum = Simd::Add(sum, Simd::Load(expansion + i));
        if (given.bias != nullptr) sum = Simd::Add(sum, Simd::Load(given.bias + part.column + i, left));
        Simd::Store(to + i, sum, left);
      }
    }
  }

  // All threads read W and [A;R] at once, run by run; then B is added.
  void FewRows() const {
    const Matrix& matrix = given.weight;
    const int64_t outputs = matrix.outputs, reductions = has_adapter() ? into.splits : 0;
    parallel(static_cast<size_t>(reductions + weight.splits * weight.runs), [&](size_t task) {
      const int64_t index = static_cast<int64_t>(task) - reductions;
      if (index < 0) return Reduce(static_cast<int64_t>(task), 0, rows);
      const int64_t split = index / weight.runs, column = index % weight.runs * weight.columns;
      const int64_t columns = Min(weight.columns, outputs - column);
      const Part part = TaskPart(0, rows, column, columns, UnpackedBytes(matrix, rows));
      AddProduct(matrix, x, weight.first_block(split), weight.first_block(split + 1), part);
      for (int64_t r = 0; r < rows; ++r) {
        float* to = partial + (split * rows + r) * outputs + column;
        for (int64_t i = 0; i < columns; i += Simd::kLanes) {
          Simd::Store(to + i, Simd::Load(part.sums + r * part.stride + i),
                      static_cast<int>(Min(Simd::kLanes, columns - i)));
        }
      }
    });
    if (has_adapter()) {
      for (int64_t row = 0; row < rows; ++row) Gate(row);
    }
    const int64_t width = RoundUp(CeilDivide(outputs, kPartsPerMatrix), kTile);
    parallel(static_cast<size_t>(CeilDivide(outputs, width)), [&](size_t index) {
      const int64_t column = static_cast<int64_t>(index) * width, columns = Min(width, outputs - column);
      const Part part = TaskPart(0, rows, column, columns, UnpackedBytes(given.adapter_out, rows));
      if (has_adapter()) AddProduct(given.adapter_out, z, 0, BlocksOf(given.adapter_out), part);
      Finish(part, [&](int64_t row, int64_t i, int left) {
        Floats sum = Simd::Load(partial + row * outputs + column + i, left);
        for (int64_t split = 1; split < weight.splits; ++split) {
          sum = Simd::Add(sum, Simd::Load(partial + (split * rows + row) * outputs + column + i, left));
        }
        return sum;
      });
    });
  }

  // [A;R] for all rows, then W and B together, part by part of the outputs.
  void ManyRows() const {
    const Matrix &matrix = given.weight, &out_of = given.adapter_out;
    const int64_t row_parts = CeilDivide(rows, kRowsPerTask), per_part = CeilDivide(rows, row_parts);
    if (has_adapter()) {
      parallel(static_cast<size_t>(row_parts * into.splits), [&](size_t task) {
        const int64_t row = static_cast<int64_t>(task) / into.splits * per_part;
        if (row < rows) Reduce(static_cast<int64_t>(task) % into.splits, row, Min(per_part, rows - row));
      });
      ForRows(rows, parallel, [&](int64_t row) { Gate(row); });
    }
    const int64_t unpacked = Max(UnpackedBytes(matrix, per_part), has_adapter() ? UnpackedBytes(out_of, per_part) : 0);
    const int64_t by_cache = Max(1, kTaskBytes / (8 * per_part + unpacked) / kTile);
    const int64_t by_share = CeilDivide(CeilDivide(matrix.outputs, kTile), kPartsPerMatrix);
    const int64_t width = Min(by_cache, by_share) * kTile, parts = CeilDivide(matrix.outputs, width);
    parallel(static_cast<size_t>(row_parts * parts), [&](size_t task) {
      const int64_t row = static_cast<int64_t>(task) / parts * per_part, count = Min(per_part, rows - row);
      const int64_t column = static_cast<int64_t>(task) % parts * width;
      if (count <= 0) return;
      const Part part = TaskPart(row, count, column, Min(width, matrix.outputs - column), unpacked, 1);
      const int64_t sums = count * part.stride;
      float* total = part.sums + sums;
      for (int64_t split = 0; split < weight.splits; ++split) {
        AddProduct(matrix, x, weight.first_block(split), weight.first_block(split + 1), part);
        for (int64_t i = 0; i < sums; i += Simd::kLanes) {
          const Floats more = Simd::Load(part.sums + i);
          Simd::Store(total + i, split == 0 ? more : Simd::Add(Simd::Load(total + i), more));
        }
        Clear(part.sums, sums);
      }
      if (has_adapter()) AddProduct(out_of, z, 0, BlocksOf(out_of), part);
      Finish(part, [&](int64_t r, int64_t i, int) { return Simd::Load(total + r * part.stride + i); });
    });
  }
};

}  // namespace

void SIMD_KERNEL(HLoraLinear)(const HLoraLinearArguments& given, const Parallel& parallel) {
  const int64_t rows = given.rows;
  if (rows == 0) return;
  const bool adapter = given.experts > 0;
  const int64_t rank = adapter ? given.adapter_out.channels : 0, low_size = adapter ? given.adapter_in.outputs : 0;
  Call call = {
      given, parallel, rows, rank, low_size, Cut(adapter ? given.adapter_in : given.weight), Cut(given.weight)};
  // x is rounded once if [A;R] has W's blocks.
  const bool shared = adapter && IsInteger(given.weight.storage) && IsInteger(given.adapter_in.storage) &&
                      given.weight.block_size == given.adapter_in.block_size;
  const auto place = [&](void* start) {
    Pieces pieces = {reinterpret_cast<uintptr_t>(start)};
    call.x = PlaceInput(given.x, rows, given.weight, pieces.Take<void>(RoundedBytes(rows, given.weight)));
    if (adapter) {
      call.x_into =
          shared ? call.x
                 : PlaceInput(given.x, rows, given.adapter_in, pieces.Take<void>(RoundedBytes(rows, given.adapter_in)));
      call.low = pieces.Take<float>(static_cast<size_t>(call.into.splits * rows * low_size) * sizeof(float));
      const float* gated = pieces.Take<float>(static_cast<size_t>(rows * rank) * sizeof(float));
      call.z = PlaceInput(gated, rows, given.adapter_out, pieces.Take<void>(RoundedBytes(rows, given.adapter_out)));
    }
    if (rows <= kFewRows) {
      call.partial =
          pieces.Take<float>(static_cast<size_t>(call.weight.splits * rows * given.weight.outputs) * sizeof(float));
    }
    return pieces.used;
  };
  place(ScratchMemory(Scratch::kCall, place(nullptr)));
  if (IsInteger(given.weight.storage) || (adapter && IsInteger(given.adapter_in.storage))) {
    ForRows(rows, parallel, [&](int64_t row) {
      RoundRow(call.x, given.weight, row);
      if (adapter && !shared) RoundRow(call.x_into, given.adapter_in, row);
    });
  }
  rows <= kFewRows ? call.FewRows() : call.ManyRows();
}

}  // namespace healthgpt
