// How a product is divided into parts for the threads, and the memory of a task on one part.
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
constexpr bool kManyRegisters = Simd::kRegisters >= 32;
// Rows, and vectors of integer sums per row, that registers hold at once: 24 of 32 registers, or 12 of 16.
constexpr int kRowsAtOnce = kManyRegisters ? 3 : 6;
constexpr int kSumsAtOnce = kManyRegisters ? kVectors : 2;
constexpr int64_t kFloatRowsAtOnce = 6;  // with fewer vectors per row (SumsPerRow)
constexpr int64_t kFloatRowsInPlace = 2 * kFloatRowsAtOnce;
// Up to this many rows, threads divide the channels among each other, unless they can divide panels (ByPanels); with
// more rows, the outputs.
constexpr int64_t kRowsBySplit = kManyRegisters ? 4 : 8;
// Up to kRowsByPanel rows go through a matrix in panels one panel after the other, up to kRowsInPanel of them as few
// rows. Up to kRowsTileByTile rows read a panel in place where there are many registers (TileByTile).
constexpr int64_t kRowsByPanel = 32, kRowsInPanel = 12, kRowsTileByTile = 24;
static_assert(kPanel % kTile == 0);
constexpr int64_t kFloatBlock = 64;  // channels of a tile of floats
// How far ahead weights are prefetched. With few rows a row of the file with fewer than kWideBytes is prefetched by
// bytes. Of wider ones, kWideChannels of which are read at once, comes next what lies kBytesOn further on or, with few
// registers, the next channels. Channels a multiple of 4 KiB apart share one set of the L1 cache, all of whose ways are
// then taken by those that are being read: so also the next channels are prefetched kBytesOn further on. A panel is
// prefetched by kPanelBytesAhead or, where several groups of rows go through a block, by that block and
// kPanelBytesBeyond. With more rows scales are prefetched by tiles, and so are weights where they are not by blocks
// (AddBlockUnpacked).
constexpr int64_t kWideBytes = 2048;
constexpr int64_t kBytesAhead = (kManyRegisters ? 16 : 24) << 10;
constexpr int64_t kWideChannels = kManyRegisters ? 16 : 8;
constexpr int64_t kBytesOn = kManyRegisters ? 384 : 256;
constexpr int64_t kPanelBytesAhead = 6 << 10, kPanelBytesBeyond = 2 << 10;
constexpr int64_t kNarrowBlock = 24 << 10;  // bytes of a block, see TileByTile
constexpr int64_t kTilesAhead = 4, kScalesAhead = 2;
constexpr int64_t kTaskBytes = 384 << 10;  // of a task's sums, so that they stay in the L2 cache
constexpr int64_t kRowsPerTask = 384;
// With few rows, a run has at most kRunSums sums, which fit into the L2 cache, but always up to kRunColumns outputs.
constexpr int64_t kRunSums = 64 << 10, kRunColumns = 10 << 10;
constexpr int64_t kShortRun = 2048;  // outputs that a run has at least, however many threads wait
constexpr int64_t kSplits = 8;       // of the channels, at most
constexpr int64_t kParts = 8;        // of the outputs, at least, if the matrix is large enough

constexpr bool IsInteger(Storage storage) { return storage == Storage::kInt4 || storage == Storage::kInt8; }
// Up to this many rows, a matrix is read in place, without unpacking tiles. Where pairs are added, unpacking saves less
// and makes two tiles of an 8-bit one.
constexpr int64_t FewRows(Storage storage) {
  if (!IsInteger(storage)) return 3;
  if (kInPairs) return storage == Storage::kInt4 ? 8 : 16;
  return kManyRegisters ? 4 : 3;
}
int64_t BlockOf(const Matrix& matrix) { return IsInteger(matrix.storage) ? matrix.block_size : kFloatBlock; }
int64_t BlocksOf(const Matrix& matrix) { return CeilDivide(matrix.channels, BlockOf(matrix)); }

// Bytes of a row of `outputs` outputs of integers, an even number for int4.
constexpr int64_t RowBytes(Storage storage, int64_t outputs) {
  return storage == Storage::kInt4 ? outputs / 2 : outputs;
}
template <Storage storage>
constexpr int64_t RowBytes(int64_t outputs) {
  return RowBytes(storage, outputs);
}

// Where the integers of a matrix lie, and their scales. A matrix in row-major order is one panel.
template <Storage storage>
struct Layout {
  const uint8_t* values;
  const void* scales;
  int64_t width;   // outputs of a panel
  int64_t stride;  // bytes from one channel to the next
  int64_t channels, blocks;

  explicit SIMD_INLINE Layout(const Matrix& matrix)
      : values(static_cast<const uint8_t*>(matrix.values)),
        scales(matrix.scales),
        width(matrix.panel != 0 ? matrix.panel : matrix.outputs),
        stride(RowBytes<storage>(width)),
        channels(matrix.channels),
        blocks(BlocksOf(matrix)) {}

  int64_t panel_bytes() const { return channels * stride; }
  SIMD_INLINE const uint8_t* At(int64_t channel, int64_t column) const {
    const int64_t panel = column / width;
    return values + (panel * channels + channel) * stride + RowBytes<storage>(column - panel * width);
  }
  // The number of a scale among all of them.
  SIMD_INLINE int64_t ScaleAt(int64_t block, int64_t column) const {
    const int64_t panel = column / width;
    return (panel * blocks + block) * width + column - panel * width;
  }
};

// The rows and outputs of a task, with its memory. The outputs are a multiple of kTile except at the matrix's end.
struct Part {
  int64_t row, rows, column, columns;
  int64_t stride;  // columns, rounded up to whole tiles
  float* sums;     // (rows, stride), of the current split
  float* totals;   // (rows, stride), of all splits so far; or null
  void* unpacked;  // one block of a tile's channels, or integer sums (tiles, rows, kTile)
  // Where the results of all blocks will be written, row by row, or null: they are fetched with the last block, for
  // nothing would hide the memory's latency then.
  const float* results = nullptr;
  int64_t results_stride = 0;

  int64_t tiles() const { return CeilDivide(columns, kTile); }
  // `count` outputs from number `first` on, a multiple of kTile, or as many as there are.
  Part At(int64_t first, int64_t count) const {
    return {row,
            rows,
            column + first,
            Min(count, columns - first),
            stride,
            sums + first,
            totals == nullptr ? nullptr : totals + first,
            unpacked,
            results == nullptr ? nullptr : results + first,
            results_stride};
  }
  // The same part, whose results will be written from `first_result` on, in rows so far apart.
  Part Fetching(const float* first_result, int64_t apart) const {
    Part part = *this;
    part.results = first_result;
    part.results_stride = apart;
    return part;
  }
  // Fetches the results of `count` rows of a tile.
  SIMD_INLINE void FetchResults(int64_t first, int64_t count, int64_t tile) const {
    if (results == nullptr) return;
    const float* from = results + first * results_stride + tile * kTile;
    for (int64_t i = 0; i < count; ++i, from += results_stride) {
      for (int64_t line = 0; line < kTile; line += 16) __builtin_prefetch(from + line, 1, 2);
    }
  }
};

// Where a block's sums go. They are added to `from`, the sums of the split's earlier blocks, and after the split's last
// block also to `before`, the sums of the earlier splits. Null stands for zeros.
struct Sums {
  const float* from;
  const float* before;
  float* to;

  Sums At(int64_t place) const { return {At(from, place), At(before, place), to + place}; }
  // Adds factor * values at one place.
  SIMD_INLINE void Add(int64_t place, Floats factor, Floats values) const {
    const Floats start = from == nullptr ? Simd::Repeat(0.0f) : Simd::Load(from + place);
    const Floats sum = Simd::MultiplyAdd(factor, values, start);
    Simd::Store(to + place, before == nullptr ? sum : Simd::Add(Simd::Load(before + place), sum));
  }
  // Calls add(sums) where the compiler knows which of them are null: half of the instructions of an unrolled loop would
  // ask otherwise.
  template <class Function>
  SIMD_INLINE void ByKind(const Function& add) const {
    if (from == nullptr && before == nullptr) return add(Sums{nullptr, nullptr, to});
    if (from == nullptr) return add(Sums{nullptr, before, to});
    if (before == nullptr) return add(Sums{from, nullptr, to});
    add(*this);
  }

 private:
  static const float* At(const float* sums, int64_t place) { return sums == nullptr ? nullptr : sums + place; }
};

// The Sums of a part for one block: whether it is the `first` or the `last` of its split, and whether the split is
// `added` to the part's totals or replaces them.
SIMD_INLINE Sums SumsOf(const Part& part, bool first, bool last, bool added) {
  const bool ends = last && part.totals != nullptr;
  return {first ? nullptr : part.sums, ends && added ? part.totals : nullptr, ends ? part.totals : part.sums};
}

// The number of a tile's outputs that the matrix has.
SIMD_INLINE int TileColumns(const Part& part, int64_t tile) {
  return static_cast<int>(Min(kTile, part.columns - tile * kTile));
}

// How a product's channels are divided into splits, by its shape alone. The sums of each split are computed separately
// and added in order, so a row's bits do not depend on the threads. With few rows, threads share the splits.
struct Cut {
  int64_t splits;
  int64_t blocks;

  explicit Cut(const Matrix& matrix, int64_t most_splits = kSplits)
      : splits(Min(BlocksOf(matrix), most_splits)), blocks(BlocksOf(matrix)) {}
  int64_t first_block(int64_t split) const { return blocks * split / splits; }
};

// Splits `first` to `end` of a cut, whose sums are added up.
struct Splits {
  const Cut& cut;
  int64_t first, end;

  // Calls add(first block, end block, whether it is the first) for each split.
  template <class Function>
  void Each(const Function& add) const {
    for (int64_t split = first; split < end; ++split) {
      add(cut.first_block(split), cut.first_block(split + 1), split == first);
    }
  }
};

// At least `parts`, and as many for each of the threads.
int64_t SharedParts(int64_t parts, int64_t threads) { return threads * CeilDivide(parts, threads); }

// Whether few rows can go through whole panels: there are any, and they keep seven eighths of the threads busy.
bool ByPanels(const Matrix& matrix, int64_t threads) {
  if (matrix.panel == 0) return false;
  const int64_t panels = matrix.outputs / matrix.panel;
  return 8 * panels >= 7 * RoundUp(panels, threads);
}

// The outputs of a run, which few rows go over side by side. All outputs if their sums stay in the L2 cache, because
// whole rows are contiguous in the file. (Hardware prefetchers go past the end of a short run, into data that another
// thread reads.) But the tasks, so many splits of each run, must keep seven eighths of the threads busy.
int64_t RunColumns(int64_t outputs, int64_t rows, int64_t splits, int64_t threads) {
  int64_t runs = CeilDivide(outputs, Max(kRunColumns, kRunSums / rows));
  const int64_t most = Max(runs, outputs / kShortRun);
  while (runs < most && 8 * splits * runs < 7 * SharedParts(splits * runs, threads)) ++runs;
  return RoundUp(CeilDivide(outputs, runs), kTile);
}

// Whether few rows go through a block of channels tile by tile, with sums in registers: if the block is a panel's, or
// so narrow that the L1 cache holds it. Only where there are many registers.
bool TileByTile(const Matrix& matrix) {
  if (!kManyRegisters || !IsInteger(matrix.storage)) return false;
  if (matrix.panel != 0) return true;
  if (matrix.storage == Storage::kInt4 && matrix.outputs % 2 != 0) return false;
  return matrix.block_size * RowBytes(matrix.storage, matrix.outputs) <= kNarrowBlock;
}

// Whether so few rows read the matrix in place.
bool InPlace(const Matrix& matrix, int64_t rows) {
  if (TileByTile(matrix)) return rows <= kRowsTileByTile;
  return rows <= FewRows(matrix.storage) && (matrix.storage != Storage::kInt4 || matrix.outputs % 2 == 0);
}

// Bytes that a task needs besides its sums: for integer sums in between, or for one unpacked tile.
int64_t UnpackedBytes(const Matrix& matrix, int64_t rows, int64_t columns) {
  if (!IsInteger(matrix.storage)) return kFloatBlock * kTile * 4;
  if (InPlace(matrix, rows) && !TileByTile(matrix)) {
    return rows * RoundUp(matrix.panel != 0 ? Min(columns, kPanel) : columns, kTile) * 4;
  }
  return matrix.block_size * kTile * (kInPairs && matrix.storage == Storage::kInt8 ? 2 : 1);
}

// A part with its memory: for one split, or for `several` that are added up.
Part TaskPart(int64_t row, int64_t rows, int64_t column, int64_t columns, int64_t unpacked_bytes,
              bool several = false) {
  const int64_t stride = RoundUp(columns, kTile), sums = rows * stride, all = several ? 2 * sums : sums;
  const int64_t bytes = all * static_cast<int64_t>(sizeof(float)) + unpacked_bytes;
  float* memory = static_cast<float*>(ScratchMemory(Scratch::kTask, static_cast<size_t>(bytes)));
  return {row, rows, column, columns, stride, memory, several ? memory + sums : nullptr, memory + all};
}

}  // namespace
}  // namespace healthgpt
