// How a product is cut into parts for the threads, and what a task on one part works with.
#pragma once

#include "hlora_linear/hlora_linear.h"
#include "scratch.h"
#include "simd/simd.h"
#include "simd/sizes.h"

namespace healthgpt {
namespace {

using Bytes = Simd::Bytes;
using Ints = Simd::Ints;
using Floats = Simd::Floats;

constexpr int kVectors = 8;                         // of sums per row
constexpr int64_t kTile = kVectors * Simd::kLanes;  // outputs
constexpr bool kInPairs = Simd::kPairsPerSum4 > 1;  // see pair_product.h
// Rows and vectors of integer sums that registers hold at once: 24 of 32, or 12 of 16.
constexpr int kRowsAtOnce = Simd::kRegisters >= 32 ? 3 : 6;
constexpr int kSumsAtOnce = Simd::kRegisters >= 32 ? kVectors : 2;
constexpr int64_t kFloatRowsAtOnce = 6;  // with fewer vectors each (SumsPerRow)
// For as many or fewer, threads share the splits of the channels.
constexpr int64_t kRowsBySplit = Simd::kRegisters >= 32 ? 12 : 8;
constexpr int64_t kFloatBlock = 64;        // channels of a tile of floats
constexpr int64_t kChannelsAhead = 8;      // fetched before they are read, by few rows of a wide matrix;
constexpr int64_t kBytesAhead = 24 << 10;  // of one whose rows in the file are shorter than kWideBytes;
constexpr int64_t kWideBytes = 2048;
constexpr int64_t kTilesAhead = 4;         // and by more rows
constexpr int64_t kTaskBytes = 384 << 10;  // of a task's sums, to stay in the second cache
constexpr int64_t kRowsPerTask = 384;
// Sums that a run of few rows keeps in the second cache, and the outputs that it has in any case.
constexpr int64_t kRunSums = 64 << 10, kRunColumns = 10 << 10;
constexpr int64_t kPartsPerMatrix = 8;  // at least, where it is large enough

constexpr bool IsInteger(Storage storage) { return storage == Storage::kInt4 || storage == Storage::kInt8; }
// As many rows or fewer go over a matrix as it lies in the file. Where pairs are added, unpacking saves less, and makes
// two tiles of one of 8 bits.
constexpr int64_t FewRows(Storage storage) {
  return !kInPairs || !IsInteger(storage) ? 3 : storage == Storage::kInt4 ? 8 : 16;
}
int64_t BlockOf(const Matrix& matrix) { return IsInteger(matrix.storage) ? matrix.block_size : kFloatBlock; }
int64_t BlocksOf(const Matrix& matrix) { return CeilDivide(matrix.channels, BlockOf(matrix)); }

// What a task works on: rows and outputs (a multiple of kTile but at the matrix' end), and its memory.
struct Part {
  int64_t row, rows, column, columns;
  int64_t stride;  // columns, rounded up to whole tiles
  float* sums;     // (rows, stride): of one split
  float* totals;   // (rows, stride): of all splits so far, or null
  void* unpacked;  // a block of channels of a tile, or (tiles, rows, kTile) integers
};

// What the sums of a block, or of some channels, are added to and where they go: to those of the blocks before them in
// the split, `from`, and behind the last block also to those of the splits `before`; null stands for zeros.
struct Sums {
  const float* from;
  const float* before;
  float* to;

  Sums At(int64_t place) const { return {At(from, place), At(before, place), to + place}; }
  // The products of factors and values that belong at the place.
  SIMD_INLINE void Add(int64_t place, Floats factor, Floats values) const {
    const Floats start = from == nullptr ? Simd::Repeat(0.0f) : Simd::Load(from + place);
    const Floats sum = Simd::MultiplyAdd(factor, values, start);
    Simd::Store(to + place, before == nullptr ? sum : Simd::Add(Simd::Load(before + place), sum));
  }

 private:
  static const float* At(const float* sums, int64_t place) { return sums == nullptr ? nullptr : sums + place; }
};

// The sums of a part for the first, or the last block of a split, which is `added` to what the totals hold.
SIMD_INLINE Sums SumsOf(const Part& part, bool first, bool last, bool added) {
  const bool ends = last && part.totals != nullptr;
  return {first ? nullptr : part.sums, ends && added ? part.totals : nullptr, ends ? part.totals : part.sums};
}

// Outputs of a tile that exist.
SIMD_INLINE int TileColumns(const Part& part, int64_t tile) {
  return static_cast<int>(Min(kTile, part.columns - tile * kTile));
}

// How a product is cut, by its shape alone: the sums of a split of the channels are made apart and added in order, so a
// row gets the same bits whoever computes them. For few rows the splits are what threads share.
struct Cut {
  int64_t splits;
  int64_t blocks;

  explicit Cut(const Matrix& matrix) : blocks(BlocksOf(matrix)) { splits = Min(blocks, kPartsPerMatrix); }
  int64_t first_block(int64_t split) const { return blocks * split / splits; }
};

// The outputs that few rows go over side by side: all of them, if their sums stay in the second cache, for whole rows
// lie one behind the other in the file. (Prefetchers run past the end of a short run, into what another thread reads.)
int64_t RunColumns(int64_t outputs, int64_t rows) {
  const int64_t runs = CeilDivide(outputs, Max(kRunColumns, kRunSums / rows));
  return RoundUp(CeilDivide(outputs, runs), kTile);
}

// Whether so few rows go over a matrix as it lies in the file.
bool InPlace(const Matrix& matrix, int64_t rows) {
  return rows <= FewRows(matrix.storage) && (matrix.storage != Storage::kInt4 || matrix.outputs % 2 == 0);
}

// Bytes that a task needs beside its sums: for its sums to wait in, or for one unpacked tile.
int64_t UnpackedBytes(const Matrix& matrix, int64_t rows, int64_t columns) {
  if (!IsInteger(matrix.storage)) return kFloatBlock * kTile * 4;
  if (InPlace(matrix, rows)) return rows * RoundUp(columns, kTile) * 4;
  return matrix.block_size * kTile * (kInPairs && matrix.storage == Storage::kInt8 ? 2 : 1);
}

// A part of one split, or of several that are added up.
Part TaskPart(int64_t row, int64_t rows, int64_t column, int64_t columns, int64_t unpacked_bytes,
              bool several = false) {
  const int64_t stride = RoundUp(columns, kTile), sums = rows * stride, all = several ? 2 * sums : sums;
  const int64_t bytes = all * static_cast<int64_t>(sizeof(float)) + unpacked_bytes;
  float* memory = static_cast<float*>(ScratchMemory(Scratch::kTask, static_cast<size_t>(bytes)));
  return {row, rows, column, columns, stride, memory, several ? memory + sums : nullptr, memory + all};
}

}  // namespace
}  // namespace healthgpt
