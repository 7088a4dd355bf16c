// Products with int8 and int4 matrices. x is quantised to bytes, and sums within a block are exact.
#pragma once

#include "hlora_linear/input.h"
#include "hlora_linear/pair_product.h"
#include "hlora_linear/part.h"
#include "hlora_linear/tile_product.h"

namespace healthgpt {
namespace {

// Bytes of one channel of a tile in the file.
template <Storage storage>
constexpr int64_t TileBytes() {
  return storage == Storage::kInt4 ? kTile / 2 : kTile;
}

// What some channels of a tile prefetch: as many pieces of a tile's width, `stride` bytes apart.
struct Next {
  const uint8_t* from;
  int64_t stride;

  // Four pieces from number `channel` on, into the L1 cache if kNear, otherwise into the L2 cache.
  template <Storage storage, bool kNear>
  SIMD_INLINE void Fetch(int64_t channel) const {
    for (int64_t i = 0; i < 4; ++i) {
      const uint8_t* piece = from + (channel + i) * stride;
      for (int64_t line = 0; line < TileBytes<storage>(); line += 64) {
        __builtin_prefetch(piece + line, 0, kNear ? 3 : 2);
      }
    }
  }
};

// What is prefetched of a part's next block, by lines: row after row, because memory is slower with the order of tiles,
// whose rows lie far apart.
struct NextBlock {
  const uint8_t* line;
  int64_t of_row, of_part;  // the line's number in its row of the part, and how many there are
  int64_t skip;             // bytes from the end of one of these rows to the next

  template <int kLines>
  SIMD_INLINE void Fetch() {
    for (int i = 0; i < kLines; ++i) {
      __builtin_prefetch(line, 0, 2);
      line += 64;
      if (++of_row < of_part) continue;
      of_row = 0;
      line += skip;
    }
  }
};

// Loads four channels of a tile as eight vectors, each with four channels of kLanes outputs, in the order of
// Interleave, and calls use(Constant<i>, vector i). Unless kWhole, channels from `channels` on and outputs from
// `columns` on are zero.
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

// The same, but one vector after the other, each used before the next is loaded: a product of three rows leaves no
// register for a second one. Pairs of vectors of 4-bit weights are joined (Simd::Join4).
template <class Target, Storage storage, bool kWhole, class Use>
SIMD_INLINE void LoadInTurn(const uint8_t* from, int64_t stride, int64_t channels, int columns, const Use& use) {
  constexpr int parts = storage == Storage::kInt4 ? 1 : 2;
  constexpr int width = 4 * Target::kLanes;
  const int bytes = storage == Storage::kInt4 ? (columns + 1) / 2 : columns;
  Unroll<2 * parts>([&](auto turn) SIMD_INLINE_LAMBDA {
    constexpr int part = turn.value / 2, half = turn.value % 2;
    SIMD_ANEW(from);
    const auto load = [&](int row) SIMD_INLINE_LAMBDA {
      const uint8_t* at = from + row * stride + part * width;
      if (kWhole) return Target::LoadBytes(at);
      return row < channels ? Target::LoadBytes(at, static_cast<int>(Max(bytes - part * width, 0))) : Target::NoBytes();
    };
    Bytes pair[2];
    Target::template InterleaveHalf<half>(load(0), load(1), load(2), load(3), pair);
    Unroll<2>([&](auto i) SIMD_INLINE_LAMBDA {
      constexpr int vector = 2 * half + i.value;
      if constexpr (storage == Storage::kInt4) {
        const Bytes joined = Target::Join4(pair[i]);
        use(Constant<2 * vector>{}, joined);
        use(Constant<2 * vector + 1>{}, Target::Upper4(joined));
      } else {
        use(Constant<4 * part + vector>{}, Target::Shift8(pair[i]));
      }
    });
  });
}

// How many of a tile's next `channels` channels can be loaded whole. Past the outputs come those of the next channel;
// they do no harm, because their scales are zero (TileScales). Only the end of the matrix must not be passed.
template <Storage storage>
SIMD_INLINE int64_t WholeChannels(const Matrix& matrix, const uint8_t* from, int64_t stride, int64_t channels,
                                  int columns) {
  if (columns == kTile) return channels;
  const uint8_t* end = static_cast<const uint8_t*>(matrix.values) + matrix.channels * stride;
  const int64_t spare = end - from - TileBytes<storage>();
  return spare < 0 ? 0 : Min(channels, spare / stride + 1);
}

template <Storage storage>
SIMD_INLINE bool IsWhole(const Matrix& matrix, const uint8_t* from, int64_t stride, int64_t channels, int columns) {
  return WholeChannels<storage>(matrix, from, stride, channels, columns) == channels;
}

// Eight vectors from the order of LoadChannels to the order of columns.
template <Storage storage>
SIMD_INLINE void OrderColumns(Ints (&vectors)[kVectors]) {
  if constexpr (storage == Storage::kInt4) {
    Simd::Order4(vectors);
  } else {
    Simd::Order8(vectors);
  }
}

// With an odd number of int4 outputs every other channel starts inside a byte, so values are read one at a time.
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

// The number that was added to the weights of an unpacked tile.
template <Storage storage>
constexpr int UnpackedOffset() {
  return storage == Storage::kInt4 ? Simd::kOffset4 : kInPairs ? kPairedOffset8 : Simd::kOffset8;
}

template <Storage storage>
SIMD_INLINE Ints Dot(Ints sum, Bytes weights, Bytes x) {
  return storage == Storage::kInt4 ? Simd::Dot4(sum, weights, x) : Simd::Dot8(sum, weights, x);
}

// Dot products of kRows rows of x with kSums vectors of a tile, whose weights are in the order of Interleave or of
// columns.
template <Storage storage, int kRows, int kSums = kVectors>
struct Products {
  Ints at[kRows][kSums];

  SIMD_INLINE void Load(const int32_t* from) {
    Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
      Unroll<kVectors>([&](auto i)
                           SIMD_INLINE_LAMBDA { at[r][i] = Simd::LoadInts(from + (r * kVectors + i) * Simd::kLanes); });
    });
  }
  SIMD_INLINE void Store(int32_t* to) const {
    Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
      Unroll<kVectors>([&](auto i)
                           SIMD_INLINE_LAMBDA { Simd::StoreInts(to + (r * kVectors + i) * Simd::kLanes, at[r][i]); });
    });
  }
  // Begins the sums with what takes the weights' offset back, by the sum of each row of x.
  SIMD_INLINE void Begin(const int32_t* x_sums) {
    Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
      const Ints start = Simd::RepeatInt(-UnpackedOffset<storage>() * x_sums[r]);
      Unroll<kSums>([&](auto i) SIMD_INLINE_LAMBDA { at[r][i] = start; });
    });
  }
  // The same for joined 4-bit weights, and Separate for the end (Simd::Join4).
  template <class Target>
  SIMD_INLINE void BeginJoined(const int32_t* x_sums) {
    if constexpr (storage != Storage::kInt4) return Begin(x_sums);
    Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
      const Ints joined = Simd::RepeatInt(-Target::kJoinedOffset4 * x_sums[r]);
      const Ints upper = Simd::RepeatInt(-Target::kUpperOffset4 * x_sums[r]);
      Unroll<kSums>([&](auto i) SIMD_INLINE_LAMBDA { at[r][i] = i % 2 == 0 ? joined : upper; });
    });
  }
  template <class Target>
  SIMD_INLINE void Separate() {
    if constexpr (storage != Storage::kInt4) return;
    Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
      Unroll<kSums / 2>([&](auto i) SIMD_INLINE_LAMBDA { Target::Separate4(at[r][2 * i], at[r][2 * i + 1]); });
    });
  }
  // Multiplies the first `channels` channels of an unpacked tile of `size` channels. The tile's vectors for these sums
  // begin at `weights`; rows of x are `size` bytes apart. Every four channels kLines more of `next` are prefetched.
  template <int kLines>
  SIMD_INLINE void Multiply(const uint8_t* weights, const int8_t* x, int64_t size, int64_t channels,
                            const int32_t* x_sums, NextBlock& next) {
    Begin(x_sums);
    if constexpr (kInPairs) {
      AddInPairs<Simd, kRows, kSums>(weights, x, size, channels, kOnes, at);
      if (storage == Storage::kInt8) {
        AddInPairs<Simd, kRows, kSums>(weights + size * kTile, x, size, channels, kSixteens, at);
      }
      return;
    }
    for (int64_t channel = 0; channel < channels; channel += 4) {
      next.Fetch<kLines>();
      const auto load = [&](auto i) SIMD_INLINE_LAMBDA {
        return Simd::LoadBytes(weights + channel * kTile + i * 4 * Simd::kLanes);
      };
      const auto repeat = [&](auto r) SIMD_INLINE_LAMBDA { return Simd::Repeat4(x + r * size + channel); };
      const auto add = [&](auto r, auto i, Bytes loaded, Bytes bytes) SIMD_INLINE_LAMBDA {
        at[r][i] = Dot<storage>(at[r][i], loaded, bytes);
        SIMD_KEEP(at[r][i]);
      };
      // Registers hold the shorter side, and one vector of the other at a time.
      if constexpr (kRows <= kSums) {
        Bytes bytes[kRows];
        Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA { bytes[r] = repeat(r); });
        Unroll<kSums>([&](auto i) SIMD_INLINE_LAMBDA {
          const Bytes loaded = load(i);
          Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA { add(r, i, loaded, bytes[r]); });
        });
      } else {
        Bytes loaded[kSums];
        Unroll<kSums>([&](auto i) SIMD_INLINE_LAMBDA { loaded[i] = load(i); });
        Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
          const Bytes bytes = repeat(r);
          Unroll<kSums>([&](auto i) SIMD_INLINE_LAMBDA { add(r, i, loaded[i], bytes); });
        });
      }
    }
  }
  SIMD_INLINE void Order() {
    Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA { OrderColumns<storage>(at[r]); });
  }
  SIMD_INLINE void AddTo(const Sums& sums, int64_t stride, const float* scales, const float* x_scales) const {
    Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
      const Floats x_scale = Simd::Repeat(x_scales[r]);
      sums.At(r * stride).ByKind([&](const Sums& of_row) SIMD_INLINE_LAMBDA {
        Unroll<kSums>([&](auto i) SIMD_INLINE_LAMBDA {
          const Floats scale = Simd::Multiply(x_scale, Simd::Load(scales + i * Simd::kLanes));
          of_row.Add(i * Simd::kLanes, Simd::ToFloats(at[r][i]), scale);
        });
      });
    });
  }
};

// Prefetches the scales of a tile kScalesAhead tiles further on, after the part's last one of its next block: unlike
// weights they are read at the end of a product, where nothing hides how long memory takes.
template <Storage storage>
SIMD_INLINE void FetchScales(const Matrix& matrix, const Part& part, int64_t block, int64_t tile, int64_t tiles) {
  const int64_t next = tile + kScalesAhead, after = next / tiles;
  const int64_t bytes = matrix.panel != 0 ? 2 : 4;
  const int64_t at = Layout<storage>(matrix).ScaleAt(block + after, part.column + (next - after * tiles) * kTile);
  const char* from = static_cast<const char*>(matrix.scales) + at * bytes;
  for (int64_t line = 0; line < kTile * bytes; line += 64) __builtin_prefetch(from + line);
}

// The scales of a tile. Those in panels are widened to `copy`, and at the matrix's end they are copied there, with
// zeros past the last output.
template <Storage storage>
SIMD_INLINE const float* TileScales(const Matrix& matrix, const Part& part, int64_t block, int64_t tile, float* copy) {
  const int64_t at = Layout<storage>(matrix).ScaleAt(block, part.column + tile * kTile);
  if (matrix.panel != 0) {
    const uint16_t* halves = static_cast<const uint16_t*>(matrix.scales) + at;
    for (int64_t i = 0; i < kTile; i += Simd::kLanes) Simd::Store(copy + i, Simd::LoadBFloat16(halves + i));
    return copy;
  }
  const float* scales = static_cast<const float*>(matrix.scales) + at;
  const int columns = TileColumns(part, tile);
  if (columns == kTile) return scales;
  for (int64_t i = 0; i < kTile; ++i) copy[i] = i < columns ? scales[i] : 0.0f;
  return copy;
}

// Adds the products of eight channels of whole int4 tiles to the sums `waiting` (tiles, kRows, kTile). For processors
// with few registers: a tile's weights stay packed in eight of them.
template <class Target, int kRows>
void AddPackedChannels(const uint8_t* from, int64_t stride, Next next, int64_t next_tile, int64_t tiles,
                       const int8_t* x, int64_t x_stride, int32_t* waiting) {
  Bytes bytes[kRows][2];
  Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
    Unroll<2>([&](auto half) SIMD_INLINE_LAMBDA { bytes[r][half] = Target::Repeat4(x + r * x_stride + 4 * half); });
  });
  constexpr int64_t width = TileBytes<Storage::kInt4>();
  for (int64_t tile = 0; tile < tiles; ++tile, from += width, next.from += next_tile, waiting += kRows * kTile) {
    Bytes packed[2][4];
    Unroll<2>([&](auto half) SIMD_INLINE_LAMBDA {
      next.Fetch<Storage::kInt4, false>(4 * half);
      Unroll<4>([&](auto i) SIMD_INLINE_LAMBDA {
        packed[half][i] = Target::Shift4(Target::LoadBytes(from + (4 * half + i) * stride));
      });
      Target::Interleave(packed[half]);
    });
    Unroll<kVectors>([&](auto i) SIMD_INLINE_LAMBDA {
      const auto nibbles = [&](auto half) SIMD_INLINE_LAMBDA {
        return i % 2 != 0 ? Target::OddNibbles(packed[half][i / 2]) : Target::EvenNibbles(packed[half][i / 2]);
      };
      const Bytes first = nibbles(Constant<0>{}), second = nibbles(Constant<1>{});
      Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
        int32_t* sums = waiting + r * kTile + i * Target::kLanes;
        Ints total = Target::LoadInts(sums);
        if constexpr (kInPairs) {
          const Ints pairs = Target::AddPairs(Target::Pairs4(first, bytes[r][0]), Target::Pairs4(second, bytes[r][1]));
          total = Target::AddWidened(total, pairs);
        } else {
          total = Target::Dot4(Target::Dot4(total, first, bytes[r][0]), second, bytes[r][1]);
        }
        Target::StoreInts(sums, total);
      });
    });
  }
}

// AddPackedChannels for so many rows, of those that read a matrix in place.
template <int kMost = FewRows(Storage::kInt4)>
SIMD_INLINE auto PackedChannelsAdder(int64_t rows) {
  if constexpr (kMost > 1) {
    if (rows < kMost) return PackedChannelsAdder<kMost - 1>(rows);
  }
  return AddPackedChannels<Simd, kMost>;
}

// Adds the products of up to kChannels channels of a tile to the sums `waiting` (kRows, kTile), which are in registers
// meanwhile. For processors with many.
template <Storage storage, bool kNear, bool kWhole, int kChannels, int kRows>
SIMD_INLINE void AddToSums(const uint8_t* from, int64_t stride, Next next, int64_t channels, int columns,
                           const int8_t* x, int64_t x_stride, int32_t* waiting) {
  Products<storage, kRows> products;
  products.Load(waiting);
  Unroll<kChannels / 4>([&](auto quad) SIMD_INLINE_LAMBDA {
    if (!kWhole && channels <= 4 * quad) return;  // these bytes of x would belong to the next block
    if (next.from != nullptr) next.Fetch<storage, kNear>(4 * quad);
    Bytes bytes[kRows];
    Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA { bytes[r] = Simd::Repeat4(x + r * x_stride + 4 * quad); });
    LoadChannels<storage, kWhole>(from + 4 * quad * stride, stride, channels - 4 * quad, columns,
                                  [&](auto i, Bytes weights) SIMD_INLINE_LAMBDA {
                                    Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
                                      Ints& sum = products.at[r][i];
                                      sum = Dot<storage>(sum, weights, bytes[r]);
                                    });
                                  });
  });
  products.Store(waiting);
}

// Adds the products of up to eight channels of a tile to the sums `waiting` (rows, kTile). The weights are unpacked
// once for all rows.
template <Storage storage, bool kWhole>
SIMD_INLINE void AddUnpackedChannels(const uint8_t* from, int64_t stride, Next next, int64_t channels, int columns,
                                     int64_t rows, const int8_t* x, int64_t x_stride, int32_t* waiting) {
  Bytes weights[2][kVectors];
  Unroll<2>([&](auto half) SIMD_INLINE_LAMBDA {
    next.Fetch<storage, false>(4 * half);
    LoadChannels<storage, kWhole>(from + 4 * half * stride, stride, channels - 4 * half, columns,
                                  [&](auto i, Bytes loaded) SIMD_INLINE_LAMBDA { weights[half][i] = loaded; });
  });
  for (int64_t row = 0; row < rows; ++row) {
    Products<storage, 1> products;
    products.Load(waiting + row * kTile);
    Unroll<2>([&](auto half) SIMD_INLINE_LAMBDA {
      if (!kWhole && channels <= 4 * half) return;  // these bytes of x would belong to the next block
      const Bytes bytes = Simd::Repeat4(x + row * x_stride + 4 * half);
      Unroll<kVectors>([&](auto i) SIMD_INLINE_LAMBDA {
        products.at[0][i] = Dot<storage>(products.at[0][i], weights[half][i], bytes);
      });
    });
    products.Store(waiting + row * kTile);
  }
}

// Adds the products of one block of a part, read in place, kChannels channels at a time over all tiles, to the sums
// `waiting` (tiles, rows, kTile).
template <Storage storage, int kChannels, bool kNear>
void AddBlockTo(const Matrix& matrix, const Input& input, int64_t block, const Part& part, int32_t* waiting) {
  static_assert(kManyRegisters || (kChannels == 8 && !kNear));
  const int64_t size = matrix.block_size, channels = Min(size, matrix.channels - block * size);
  const Layout<storage> layout(matrix);
  const int64_t stride = layout.stride, tiles = part.tiles(), rows = part.rows;
  const int8_t* x = input.bytes + (block * input.rows + part.row) * size;
  const uint8_t* values = layout.At(block * size, part.column);
  constexpr int64_t width = TileBytes<storage>();
  const bool in_order = stride < kWideBytes && part.columns == matrix.outputs, panel = matrix.panel != 0;
  const int64_t next_stride = in_order ? width : stride, next_tile = in_order ? kChannels * width : width;
  const int64_t tiles_on = kManyRegisters ? Min(kBytesOn / width, tiles) : tiles + kBytesOn / width;
  for (int64_t channel = 0; channel < channels; channel += kChannels) {
    const uint8_t* from = values + channel * stride;
    // After a run's last tile come the first ones of the next channels.
    const auto next_of = [&](int64_t tile) SIMD_INLINE_LAMBDA {
      if (panel) return from + kPanelBytesAhead + tile * width;
      if (in_order) return from + kBytesAhead + tile * next_tile;
      const int64_t at = tile + tiles_on;
      return at < tiles ? from + at * width : from + kChannels * stride + (at - tiles) * width;
    };
    int64_t tile = 0;
    if constexpr (storage == Storage::kInt4 && Simd::kInRegisters && !kManyRegisters) {
      if (channel + 8 <= channels) {
        const uint8_t* last = from + (tiles - 1) * width;
        tile = tiles - !IsWhole<storage>(matrix, last, stride, 8, TileColumns(part, tiles - 1));
        const auto add = PackedChannelsAdder(rows);
        add(from, stride, {next_of(0), next_stride}, next_tile, tile, x + channel, size, waiting);
      }
    }
    for (; tile < tiles; ++tile) {
      const Next next = {next_of(tile), next_stride};
      const int columns = TileColumns(part, tile);
      const uint8_t* at = from + tile * width;
      int32_t* sums = waiting + tile * rows * kTile;
      const bool whole = channel + kChannels <= channels && IsWhole<storage>(matrix, at, stride, kChannels, columns);
      const int64_t left = channels - channel;
      if constexpr (kManyRegisters) {
        // Sums of three rows fit into the registers. Four rows are two pairs, the second of which finds the weights in
        // the L1 cache and fetches nothing.
        const auto add = [&](auto count, int64_t row) SIMD_INLINE_LAMBDA {
          const Next fetched = {row == 0 ? next.from : nullptr, next_stride};
          const int8_t* of_rows = x + channel + row * size;
          int32_t* to = sums + row * kTile;
          if (whole) {
            AddToSums<storage, kNear, true, kChannels, count>(at, stride, fetched, kChannels, kTile, of_rows, size, to);
          } else {
            AddToSums<storage, kNear, false, kChannels, count>(at, stride, fetched, left, columns, of_rows, size, to);
          }
        };
        if (rows == 1) {
          add(Constant<1>{}, 0);
        } else if (rows == 3) {
          add(Constant<3>{}, 0);
        } else {
          for (int64_t row = 0; row < rows; row += 2) add(Constant<2>{}, row);
        }
      } else if (whole) {
        AddUnpackedChannels<storage, true>(at, stride, next, 8, kTile, rows, x + channel, size, sums);
      } else {
        AddUnpackedChannels<storage, false>(at, stride, next, left, columns, rows, x + channel, size, sums);
      }
    }
  }
}

// AddBlockTo for wide or other rows, with the prefetches that suit this processor.
template <Storage storage>
SIMD_INLINE auto BlockAdder(bool wide) {
  if constexpr (kManyRegisters) {
    if (Simd::PrefetchesNear()) {
      return wide ? AddBlockTo<storage, kWideChannels, true> : AddBlockTo<storage, 8, true>;
    }
  }
  return wide ? AddBlockTo<storage, kWideChannels, false> : AddBlockTo<storage, 8, false>;
}

// sums += block `block` times the part's rows, read in place.
template <Storage storage>
void AddBlockInPlace(const Matrix& matrix, const Input& input, int64_t block, const Part& part, const Sums& sums_of) {
  const int64_t tiles = part.tiles(), rows = part.rows, first = block * input.rows + part.row;
  int32_t* waiting = static_cast<int32_t*>(part.unpacked);  // (tiles, rows, kTile)
  constexpr int offset = storage == Storage::kInt4 ? Simd::kOffset4 : Simd::kOffset8;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int64_t row = 0; row < rows; ++row) {
      const Ints start = Simd::RepeatInt(-offset * input.sums[first + row]);
      Unroll<kVectors>([&](auto i) SIMD_INLINE_LAMBDA {
        Simd::StoreInts(waiting + (tile * rows + row) * kTile + i * Simd::kLanes, start);
      });
    }
  }
  BlockAdder<storage>(RowBytes<storage>(matrix.outputs) >= kWideBytes)(matrix, input, block, part, waiting);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    float copy[kTile];
    const float* scales = TileScales<storage>(matrix, part, block, tile, copy);
    for (int64_t row = 0; row < rows; ++row) {
      Products<storage, 1> products;
      products.Load(waiting + (tile * rows + row) * kTile);
      products.Order();
      products.AddTo(sums_of.At(row * part.stride + tile * kTile), 0, scales, input.scales + first + row);
    }
  }
}

// The scales of a tile in the order of LoadInTurn.
template <class Target, Storage storage>
SIMD_INLINE void DisorderedScales(const Matrix& matrix, const Part& part, int64_t block, int64_t tile, float* to) {
  const float* scales = TileScales<storage>(matrix, part, block, tile, to);
  Ints bits[kVectors];
  Unroll<kVectors>([&](auto i)
                       SIMD_INLINE_LAMBDA { bits[i] = Target::FloatBits(Target::Load(scales + i * Target::kLanes)); });
  storage == Storage::kInt4 ? Target::Disorder4(bits) : Target::Disorder8(bits);
  Unroll<kVectors>([&](auto i)
                       SIMD_INLINE_LAMBDA { Target::Store(to + i * Target::kLanes, Target::FromBits(bits[i])); });
}

// sums += block `block` times kRows rows from part.row + row on, read in place from one tile, whose sums stay in
// registers. Scales and sums are in the order of LoadInTurn. If kLines > 0 the tile is whole, and with every four
// channels so many lines are prefetched from `next` on. Otherwise the first rows prefetch what follows in the file.
template <class Target, Storage storage, bool kNear, int kLines, int kRows>
void AddTileInPlace(const Matrix& matrix, const Input& input, int64_t block, const Part& part, int64_t row,
                    int64_t tile, const float* scales, const Sums& sums, const uint8_t* next) {
  constexpr int locality = kNear ? 3 : 2;
  const int64_t size = matrix.block_size, channels = Min(size, matrix.channels - block * size);
  const Layout<storage> layout(matrix);
  const int64_t first = block * input.rows + part.row + row, stride = layout.stride;
  const int8_t* x = input.bytes + first * size;
  const int columns = TileColumns(part, tile);
  const uint8_t* from = layout.At(block * size, part.column + tile * kTile);
  Products<storage, kRows> products;
  products.template BeginJoined<Target>(input.sums + first);
  const auto add = [&](auto whole, int64_t channel) SIMD_INLINE_LAMBDA {
    if (kLines > 0) {
      Unroll<kLines>([&](auto line) SIMD_INLINE_LAMBDA { __builtin_prefetch(next + 64 * line, 0, locality); });
      next += 64 * kLines;
    } else if (row == 0 && tile == 0) {
      for (int64_t line = 0; line < 4 * stride; line += 64) {
        __builtin_prefetch(from + channel * stride + kPanelBytesAhead + line, 0, locality);
      }
    }
    Bytes bytes[kRows];
    Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA { bytes[r] = Simd::Repeat4(x + r * size + channel); });
    LoadInTurn<Target, storage, whole.value != 0>(from + channel * stride, stride, channels - channel, columns,
                                                  [&](auto i, Bytes weights) SIMD_INLINE_LAMBDA {
                                                    Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
                                                      Ints& sum = products.at[r][i];
                                                      sum = Dot<storage>(sum, weights, bytes[r]);
                                                      SIMD_KEEP(sum);
                                                    });
                                                  });
  };
  const int64_t whole = kLines > 0 ? channels : WholeChannels<storage>(matrix, from, stride, channels, columns);
  int64_t channel = 0;
  for (; channel + 4 <= whole; channel += 4) add(Constant<1>{}, channel);
  if (kLines == 0) {
    for (; channel < channels; channel += 4) add(Constant<0>{}, channel);
  }
  products.template Separate<Target>();
  products.AddTo(sums.At(row * part.stride + tile * kTile), part.stride, scales, input.scales + first);
}

template <class Target, Storage storage, bool kNear, int kLines>
SIMD_INLINE auto TileAdder(int64_t rows) {
  return Pick(rows, AddTileInPlace<Target, storage, kNear, kLines, 1>,
              AddTileInPlace<Target, storage, kNear, kLines, 2>, AddTileInPlace<Target, storage, kNear, kLines, 3>);
}

// AddBlockInPlace tile by tile, by processors with many registers. The sums are left in the order of LoadInTurn.
template <class Target, Storage storage, bool kNear>
void AddTilesInPlace(const Matrix& matrix, const Input& input, int64_t block, const Part& part, const Sums& sums) {
  constexpr int64_t kRowsOfGroup = 3;  // whose sums fit into the registers
  constexpr int kLines = static_cast<int>(4 * RowBytes<storage>(kPanel) / 64);
  const int64_t tiles = part.tiles(), groups = CeilDivide(part.rows, kRowsOfGroup);
  const Layout<storage> layout(matrix);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    FetchScales<storage>(matrix, part, block, tile, tiles);
    float scales[kTile];
    DisorderedScales<Target, storage>(matrix, part, block, tile, scales);
    // The first rows read a panel from memory, the next ones find it in the L1 cache. One group prefetches as much as
    // it reads, several share the next block among each other.
    const bool whole = tile == 0 && matrix.panel != 0 && matrix.channels % 4 == 0;
    const int lines = !whole ? 0 : groups == 1 ? kLines : groups <= 3 ? kLines / 2 : kLines / 4;
    const int64_t block_bytes = matrix.block_size * layout.stride;
    const uint8_t* next = layout.At(block * matrix.block_size, part.column) +
                          (groups == 1 ? kPanelBytesAhead : Max(kPanelBytesAhead, block_bytes + kPanelBytesBeyond));
    for (int64_t row = 0; row < part.rows;) {
      const int64_t left = part.rows - row, count = left == 4 ? 2 : Min(left, kRowsOfGroup);
      const auto add = lines == 0            ? TileAdder<Target, storage, kNear, 0>(count)
                       : lines == kLines     ? TileAdder<Target, storage, kNear, kLines>(count)
                       : lines == kLines / 2 ? TileAdder<Target, storage, kNear, kLines / 2>(count)
                                             : TileAdder<Target, storage, kNear, kLines / 4>(count);
      add(matrix, input, block, part, row, tile, scales, sums, next);
      next += matrix.block_size / 4 * lines * 64;
      row += count;
    }
  }
}

// All splits tile by tile. Their sums are added up in the order of LoadInTurn and brought into that of columns once.
template <class Target, Storage storage, bool kNear>
void AddInPlace(const Matrix& matrix, const Input& input, const Splits& splits, const Part& part, bool added) {
  Part waiting = part;
  if (added) waiting.totals = nullptr;
  splits.Each([&](int64_t first_block, int64_t end_block, bool first) {
    for (int64_t block = first_block; block < end_block; ++block) {
      AddTilesInPlace<Target, storage, kNear>(matrix, input, block, waiting,
                                              SumsOf(waiting, block == first_block, block + 1 == end_block, !first));
    }
  });
  const float* from = waiting.totals != nullptr ? waiting.totals : waiting.sums;
  float* to = part.totals != nullptr ? part.totals : part.sums;
  for (int64_t row = 0; row < part.rows; ++row) {
    for (int64_t place = row * part.stride; place < row * part.stride + part.tiles() * kTile; place += kTile) {
      Ints bits[kVectors];
      Unroll<kVectors>([&](auto i) SIMD_INLINE_LAMBDA {
        bits[i] = Target::FloatBits(Target::Load(from + place + i * Target::kLanes));
      });
      OrderColumns<storage>(bits);
      Unroll<kVectors>([&](auto i) SIMD_INLINE_LAMBDA {
        float* sum = to + place + i * Target::kLanes;
        const Floats more = Target::FromBits(bits[i]);
        Target::Store(sum, added ? Target::Add(Target::Load(sum), more) : more);
      });
    }
  }
}

// Unpacks a block of channels of one tile: each 32-bit integer has four channels of a column. Prefetches as many
// channels from `next` on, into the L1 cache if kNear.
template <Storage storage, bool kNear>
void UnpackTile(const Matrix& matrix, int64_t block, const Part& part, int64_t tile, const uint8_t* next) {
  const int64_t size = matrix.block_size, channels = Min(size, matrix.channels - block * size);
  const Layout<storage> layout(matrix);
  const int64_t column = part.column + tile * kTile, stride = layout.stride;
  const int columns = TileColumns(part, tile);
  const uint8_t* first = layout.At(block * size, column);
  for (int64_t channel = 0; channel < channels; channel += 4) {
    int32_t* to = static_cast<int32_t*>(part.unpacked) + channel / 4 * kTile;
    const int64_t row = block * size + channel;
    if (storage == Storage::kInt4 && matrix.outputs % 2 != 0) {
      LoadOddChannels(layout.values, row * matrix.outputs + column, matrix.outputs, channels - channel, columns, to);
      continue;
    }
    const uint8_t* from = first + channel * stride;
    // Half of the lines into the L1 cache: with all of them it takes 1.04 to 1.16 times as long, on a Zen 5.
    if (!kNear || channel % 8 != 0) Next{next, stride}.Fetch<storage, kNear>(channel);
    Ints weights[kVectors];
    const auto keep = [&](auto i, Bytes loaded) SIMD_INLINE_LAMBDA { weights[i] = Simd::AsInts(loaded); };
    if (channel + 4 <= channels && IsWhole<storage>(matrix, from, stride, 4, columns)) {
      LoadChannels<storage, true>(from, stride, 4, kTile, keep);
    } else {
      LoadChannels<storage, false>(from, stride, channels - channel, columns, keep);
    }
    OrderColumns<storage>(weights);
    Unroll<kVectors>([&](auto i) SIMD_INLINE_LAMBDA {
      if constexpr (kInPairs && storage == Storage::kInt8) {
        StoreNibbles<Simd>(to + i * Simd::kLanes, size * kTile, weights[i]);
      } else {
        Simd::StoreInts(to + i * Simd::kLanes, weights[i]);
      }
    });
  }
}

// sums += an unpacked tile times kRows rows from part.row + row on.
template <Storage storage, int kRows, int kLines>
void AddUnpackedTile(const Matrix& matrix, const Input& input, int64_t block, const Part& part, int64_t row,
                     int64_t tile, const float* scales, const Sums& sums, NextBlock& next_block) {
  const int64_t size = matrix.block_size, channels = Min(size, matrix.channels - block * size);
  const int64_t first = block * input.rows + part.row + row;
  const int8_t* x = input.bytes + first * size;
  const uint8_t* weights = static_cast<const uint8_t*>(part.unpacked);
  NextBlock next = next_block;
  if ((block + 1) * size >= matrix.channels) part.FetchResults(row, kRows, tile);
  for (int64_t column = 0; column < kTile; column += kSumsAtOnce * Simd::kLanes) {
    Products<storage, kRows, kSumsAtOnce> products;
    products.template Multiply<kLines>(weights + 4 * column, x, size, channels, input.sums + first, next);
    products.AddTo(sums.At(row * part.stride + tile * kTile + column), part.stride, scales + column,
                   input.scales + first);
  }
  if (kLines > 0) next_block = next;
}

// AddUnpackedTile for `rows` rows, at most kRowsAtOnce.
static_assert(kRowsAtOnce == 3 || kRowsAtOnce == 6);
template <Storage storage, int kLines = 0>
SIMD_INLINE auto UnpackedTileAdder(int64_t rows) {
  if constexpr (kRowsAtOnce == 3) {
    return Pick(rows, AddUnpackedTile<storage, 1, kLines>, AddUnpackedTile<storage, 2, kLines>,
                AddUnpackedTile<storage, 3, kLines>);
  } else {
    return Pick(rows, AddUnpackedTile<storage, 1, kLines>, AddUnpackedTile<storage, 2, kLines>,
                AddUnpackedTile<storage, 3, kLines>, AddUnpackedTile<storage, 4, kLines>,
                AddUnpackedTile<storage, 5, kLines>, AddUnpackedTile<storage, 6, kLines>);
  }
}

// sums += block `block` times the part's rows, tile by tile. If kByBlocks, the first rows' products prefetch the part's
// next block, and unpacking a tile fetches the next one into the L1 cache. Otherwise unpacking prefetches a few tiles
// further on.
template <Storage storage, bool kByBlocks>
SIMD_OUTLINE void AddBlockUnpacked(const Matrix& matrix, const Input& input, int64_t block, const Part& part,
                                   const Tiles<Simd>& by_tiles, const Sums& sums) {
  constexpr int64_t width = TileBytes<storage>();
  const Layout<storage> layout(matrix);
  const int64_t tiles = part.tiles(), stride = layout.stride;
  const int64_t block_bytes = matrix.block_size * stride, tiles_ahead = kByBlocks ? 1 : Min(kTilesAhead, tiles);
  // After a part's last block comes the first one of the part to the right.
  const bool is_last = block + 1 == layout.blocks;
  const uint8_t* from =
      layout.At(is_last ? 0 : (block + 1) * matrix.block_size, part.column + (is_last ? part.columns : 0));
  // A panel's next block follows in the file; of other matrices it lies in rows.
  NextBlock next_block = {from, 0, tiles * width / 64, stride - tiles * width};
  if (matrix.panel != 0) next_block = {from, 0, block_bytes / 64, layout.panel_bytes() - block_bytes};
  for (int64_t tile = 0; tile < tiles; ++tile) {
    FetchScales<storage>(matrix, part, block, tile, tiles);
    // After the last tile comes the first one of the next block.
    const int64_t next = tile + tiles_ahead, after = next < tiles ? 0 : 1;
    UnpackTile<storage, kByBlocks>(
        matrix, block, part, tile,
        layout.At((block + after) * matrix.block_size, part.column + (next - after * tiles) * kTile));
    float copy[kTile];
    const float* scales = TileScales<storage>(matrix, part, block, tile, copy);
    int64_t row = by_tiles.Add<UnpackedOffset<storage>()>(matrix, input, block, part, tile, scales, sums);
    if constexpr (kByBlocks) {
      // As many lines as this tile has, soon enough to be done with the last rows.
      constexpr int kLines = width / 64;
      const bool hurries = part.rows <= 3 * kRowsAtOnce;
      const auto add = hurries ? UnpackedTileAdder<storage, 2 * kLines> : UnpackedTileAdder<storage, kLines>;
      const int64_t end = Min(part.rows, (hurries ? 2 : 4) * kRowsAtOnce);
      for (; row < end; row += kRowsAtOnce) {
        add(part.rows - row)(matrix, input, block, part, row, tile, scales, sums, next_block);
      }
    }
    for (; row < part.rows; row += kRowsAtOnce) {
      UnpackedTileAdder<storage>(part.rows - row)(matrix, input, block, part, row, tile, scales, sums, next_block);
    }
  }
}

template <Storage storage>
void AddBlocks(const Matrix& matrix, const Input& input, const Splits& splits, const Part& part, bool added) {
  const Tiles<Simd> tiles(matrix, part.rows);
  const bool in_place = !tiles.used() && InPlace(matrix, part.rows);
  if constexpr (kManyRegisters) {
    if (in_place && TileByTile(matrix)) {
      return Simd::PrefetchesNear() ? AddInPlace<Simd, storage, true>(matrix, input, splits, part, added)
                                    : AddInPlace<Simd, storage, false>(matrix, input, splits, part, added);
    }
  }
  // Products by tiles have no place for prefetches, nor have tiles narrower than a line.
  constexpr bool kByBlocks = kManyRegisters && TileBytes<storage>() % 64 == 0;
  const bool by_blocks = kByBlocks && !tiles.used();
  splits.Each([&](int64_t first_block, int64_t end_block, bool first) {
    for (int64_t block = first_block; block < end_block; ++block) {
      const Sums sums = SumsOf(part, block == first_block, block + 1 == end_block, added || !first);
      if (in_place) {
        AddBlockInPlace<storage>(matrix, input, block, part, sums);
      } else if (by_blocks) {
        AddBlockUnpacked<storage, kByBlocks>(matrix, input, block, part, tiles, sums);
      } else {
        AddBlockUnpacked<storage, false>(matrix, input, block, part, tiles, sums);
      }
    }
  });
}

template <Storage storage>
void AddIntegerProduct(const Matrix& matrix, const Input& input, const Splits& splits, const Part& part, bool added) {
  if (matrix.panel == 0 || part.rows > kRowsByPanel) return AddBlocks<storage>(matrix, input, splits, part, added);
  for (int64_t column = 0; column < part.columns;) {
    const Part of_panel = part.At(column, matrix.panel - (part.column + column) % matrix.panel);
    AddBlocks<storage>(matrix, input, splits, of_panel, added);
    column += of_panel.columns;
  }
}

}  // namespace
}  // namespace healthgpt
