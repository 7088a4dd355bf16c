// The H-LoRA linear of a decode step, in two launches of one kernel: z = x [A;R], then y = [W|B] [x; gate * z].
//
// B's rows continue W's. The channels of both are divided among blocks, then among each block's warps, by the shape
// alone. A warp multiplies its share of W, then its share of B. A block adds its warps' sums in order, and the last
// block of a tile of outputs adds the blocks' sums in order. So a row's bits depend neither on other rows nor on the
// order in which blocks run. On Hopper the second launch starts while the first runs: it needs z only for B.
//
// x is multiplied as the sum of two 16-bit numbers. They take two of the eight columns of a tensor-core product, so a
// product has four rows of x. A step is bound by the bytes of the weights and by latency. So each lane fetches its next
// words as soon as it has used the last ones, and loads that do not depend on each other are issued together.
#include <algorithm>

#include "cuda/launch.cuh"
#include "hlora_linear/cuda.h"
#include "hlora_linear/inputs.cuh"
#include "hlora_linear/weights.cuh"

namespace healthgpt::cuda {
namespace {

constexpr int kWarps = 8;        // of a block, along the channels
constexpr int kRowsPerTile = 4;  // of x
// The row tiles of a block. More would leave its threads too few registers.
constexpr int MostRowTiles(Storage storage) { return IsInteger(storage) ? 2 : 4; }
// Blocks that a multiprocessor must have room for. With two, no block of a launch waits for another to end.
constexpr int BlocksAtOnce(int row_tiles) { return row_tiles <= 2 ? 2 : 1; }
constexpr int kSteps = 2;                      // of a unit
constexpr int kUnit = kSteps * kStepChannels;  // channels that a warp takes at a time
constexpr int64_t kTargetBlocks = 264;         // two for each of Hopper's 132 multiprocessors
constexpr int kMostSplits = 16;                // whose sums a thread loads at once
constexpr int64_t kMostCounters = 1024;        // row groups times tiles of a launch, where these have several splits
static_assert(kTargetBlocks / 2 * (kMostDecodeRows / (2 * kRowsPerTile)) <= kMostCounters);
constexpr int64_t kMostChannels = 1 << 25;  // so that 32 rows of pairs have 32-bit indices
static_assert(2 * kMostChannels * kMostDecodeRows <= int64_t{INT32_MAX} + 1);
static_assert(kMostChannels / kUnit * kMostSplits * kWarps <= INT32_MAX);  // for Cut::Begin

// How the channels of W and of B are divided: every part gets its share of both.
struct Cut {
  int weight_units, adapter_units, splits;
  __device__ static int Begin(int units, int part, int parts) { return units * part / parts; }
  int64_t partials() const { return splits > 1 ? splits : 0; }
};

struct Product {
  int rows;
  PlainInput input;
  Weights weight, adapter_out;  // adapter_out has no channels in the first launch
  Cut cut;
  bool is_first;  // the launch that computes z, from x before its norm
  bool measure;   // computes x's norm; the second launch of two gets it from the first
  float epsilon;
  float* inverse_norm;  // (rows)
  Gating gating;        // in the second launch
  const float* bias;
  const float* residual;
  float* y;            // (rows, outputs); z in the first launch
  bool is_aligned;     // y, residual and bias may be accessed four numbers at a time
  float* partials;     // (splits, rows, partial_stride)
  int partial_stride;  // the outputs in whole fours
  float* squares;      // (tiles, splits, rows)
  int* counters;       // (row groups, tiles)
};

// The stride is chosen so that eight lanes that store 16 bytes each use different banks.
template <int kRows, int kTile>
struct Memory {
  static constexpr int kStride = kTile + 4;
  alignas(16) float sums[kWarps][kRows][kStride];
  float squares[kWarps][kRows];
  Gates<kRows> gates;
  int arrived;
};

// --- a warp's part ----------------------------------------------------------------------------------------------

// Splits a lane's four values of a unit into 16-bit numbers and exchanges them into right operands for the unit's two
// steps. The lanes of column g have row g's values for the first step, those of column g + 4 the values for the second.
// Afterwards column g has the high parts for both steps, and column g + 4 the low parts.
template <class Number>
__device__ inline void Halve(const float (&values)[4], Right (&rights)[kSteps]) {
  Number first[4], rest[4];
  for (int i = 0; i < 4; ++i) {
    first[i] = Round(values[i], Number());
    rest[i] = Round(values[i] - ToFloat(first[i]), Number());
  }
  const Right high = {Pack(first[0], first[1]), Pack(first[2], first[3])};
  const Right low = {Pack(rest[0], rest[1]), Pack(rest[2], rest[3])};
  const bool is_high = threadIdx.x < kWarpSize / 2;
  const Right given = is_high ? low : high;
  const Right taken = {ShuffleXor(given.low, kWarpSize / 2), ShuffleXor(given.high, kWarpSize / 2)};
  rights[0] = is_high ? high : taken;
  rights[1] = is_high ? taken : low;
}

template <class Format, int kRowTiles>
struct TileSums {
  static constexpr int kProducts = Format::kLaneOutputs / 2;
  Sums sums[kRowTiles][kProducts];

  __device__ void Clear() {
    for (auto& of_tile : sums) {
      for (Sums& one : of_tile) one = {};
    }
  }

  // Adds the products of one step's channels for all rows.
  __device__ void Add(const Step<Format>& step, const Right (&rights)[kRowTiles][kSteps], int at) {
#pragma unroll
    for (int j = 0; j < kProducts; j += Format::kUnpacked) {
      Left left[Format::kUnpacked];
      Format::Unpack(step.words, j / Format::kUnpacked, left);
#pragma unroll
      for (int i = 0; i < Format::kUnpacked; ++i) {
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
          MultiplyAdd(sums[tile][j + i], left[i], rights[tile][at], typename Format::Number());
        }
      }
    }
  }

  // Adds the sums, multiplied by the outputs' scales, to the lane's own place in shared memory. A lane's two columns
  // hold the high parts of rows 2 t and 2 t + 1, or the low parts of rows 2 t - 4 and 2 t - 3. It gives one of them to
  // the lane with the other part of that row, and adds the two parts of the row it keeps.
  template <int kRows, int kStride>
  __device__ void Deposit(float (&to)[kRows][kStride], const float4& scales) const {
    const int g = static_cast<int>(threadIdx.x / 4), t = static_cast<int>(threadIdx.x % 4);
    const auto complete = [&](float even, float odd) {
      const float kept = t < 2 ? even : odd, given = t < 2 ? odd : even;
      return kept + ShuffleXor(given, 2);
    };
#pragma unroll
    for (int j = 0; j < kProducts; j += 2) {
      float4 scale = {1.0f, 1.0f, 1.0f, 1.0f};
      if constexpr (Format::kIsInteger) {
        const int lane = 4 * g + j / 2;
        scale = {Shuffle(scales.x, lane), Shuffle(scales.y, lane), Shuffle(scales.z, lane), Shuffle(scales.w, lane)};
      }
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        const float (&a)[4] = sums[tile][j].values, (&b)[4] = sums[tile][j + 1].values;
        float* const place = to[tile * kRowsPerTile + OwnRow()] + g * Format::kLaneOutputs + 2 * j;
        float4 total = *reinterpret_cast<float4*>(place);
        total.x += complete(a[0], a[1]) * scale.x;
        total.y += complete(a[2], a[3]) * scale.y;
        total.z += complete(b[0], b[1]) * scale.z;
        total.w += complete(b[2], b[3]) * scale.w;
        *reinterpret_cast<float4*>(place) = total;
      }
    }
  }

  template <int kRows, int kStride>
  __device__ static void ClearPlaces(float (&to)[kRows][kStride]) {
    const int g = static_cast<int>(threadIdx.x / 4);
    for (int tile = 0; tile < kRowTiles; ++tile) {
      float* const place = to[tile * kRowsPerTile + OwnRow()] + g * Format::kLaneOutputs;
      for (int i = 0; i < Format::kLaneOutputs; i += 4) *reinterpret_cast<float4*>(place + i) = {};
    }
  }

  // The row of a tile whose sum a lane completes.
  __device__ static int OwnRow() {
    const int t = static_cast<int>(threadIdx.x % 4);
    return 2 * (t % 2) + t / 2;
  }
};

// The scales of four of the warp's outputs, from 4 times the lane's number on. Deposit passes them to the lanes that
// need them.
template <class Format>
__device__ inline float4 LoadScales(const Weights& weights, int block, int output) {
  const int t = static_cast<int>(threadIdx.x % 4);
  const int from = output + 4 * t, left = weights.outputs - from;
  const float* const at = weights.scales + static_cast<int64_t>(block) * weights.outputs + from;
  if (weights.scales_are_aligned && left > 0) return LoadOnce<float4>(at);
  return GatherFour(left, [&](int i) { return LoadOnce<float>(at + i); });
}

// Adds units [begin, end) of one matrix times the input to the warp's sums in shared memory, and the squares of this
// lane's input values to `squares`.
template <class Format, int kRowTiles, class Input, int kRows, int kStride>
__device__ inline void AddUnits(const Weights& weights, const Input& input, int begin, int end, int first_row,
                                int output, float (&to)[kRows][kStride], float (&squares)[kRowTiles]) {
  const int g = static_cast<int>(threadIdx.x / 4), t = static_cast<int>(threadIdx.x % 4);
  const int row = first_row + g % kRowsPerTile;
  const auto channel = [&](int unit) { return unit * kUnit + g / kRowsPerTile * kStepChannels + 4 * t; };
  // The sums of two tiles of integers are half of a thread's registers. Then what comes from a cache is loaded late: x
  // once the products are done (it still overtakes the weights, which were asked for before and come from memory), and
  // scales within the last unit of their block. Of int8, whose words are twice as many, only one step is on its way.
  constexpr bool kIsTight = Format::kIsInteger && kRowTiles > 1;
  constexpr int kAhead = kIsTight && Step<Format>::kWords == 4 ? 1 : kSteps;
  Step<Format> steps[kAhead];
  Loaded loaded[kRowTiles];
  float4 scales = {};
  const auto load_step = [&](int unit, int step) {
    steps[step % kAhead].Load(weights, unit * kUnit + step * kStepChannels, output);
  };
  const auto load_input = [&](int unit) {
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      loaded[tile] = input.Load(row + tile * kRowsPerTile, channel(unit));
    }
  };
  const auto block = [&](int unit) { return unit * kUnit >> weights.block_bits; };
  const auto load_scales = [&](int unit) { scales = LoadScales<Format>(weights, block(unit), output); };
  if (begin < end) {
#pragma unroll
    for (int step = 0; step < kAhead; ++step) load_step(begin, step);
    if (Format::kIsInteger && !kIsTight) load_scales(begin);
  }
  input.Wait();
  if (begin < end) load_input(begin);
  input.Prepare();

  TileSums<Format, kRowTiles> sums;
  sums.Clear();
  for (int unit = begin; unit < end; ++unit) {
    Right rights[kRowTiles][kSteps];
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      float values[4];
      input.Values(loaded[tile], row + tile * kRowsPerTile, channel(unit), values);
      loaded[tile] = {};  // or it would keep its registers until the next load
      for (const float value : values) squares[tile] += value * value;
      Halve<typename Format::Number>(values, rights[tile]);
    }
    if (!kIsTight && unit + 1 < end) load_input(unit + 1);
    const bool ends = unit + 1 == end || (Format::kIsInteger && block(unit + 1) != block(unit));
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      sums.Add(steps[step % kAhead], rights, step);
      const int next = step + kAhead, of = unit + next / kSteps;
      if (of < end) load_step(of, next % kSteps);
      if (kIsTight && step == 0 && ends) load_scales(unit);
    }
    if (ends) {
      sums.Deposit(to, scales);
      if (unit + 1 == end) break;
      sums.Clear();
      if (Format::kIsInteger && !kIsTight) load_scales(unit + 1);
    }
    if (kIsTight) load_input(unit + 1);
  }
}

// --- a block's part ---------------------------------------------------------------------------------------------

__device__ inline float InverseNorm(const Product& product, float squares) {
  return 1.0f / sqrtf(squares / static_cast<float>(product.weight.channels) + product.epsilon);
}

__device__ inline void Add(float& sum, float value) { sum += value; }
__device__ inline void Add(float4& sum, const float4& value) {
  sum.x += value.x, sum.y += value.y, sum.z += value.z, sum.w += value.w;
}

// The sum, in order, of numbers or of fours `stride` floats apart. All are loaded before the first is added.
template <class Type>
__device__ inline Type SumOfSplits(const float* at, int64_t stride, int splits) {
  Type values[kMostSplits], sum = {};
#pragma unroll
  for (int i = 0; i < kMostSplits; ++i) {
    values[i] = i < splits ? LoadFresh(reinterpret_cast<const Type*>(at + i * stride)) : Type{};
  }
#pragma unroll
  for (int i = 0; i < kMostSplits; ++i) Add(sum, values[i]);
  return sum;
}

template <Storage storage, int kRowTiles>
__global__ void __launch_bounds__(kWarpSize* kWarps, BlocksAtOnce(kRowTiles)) HLoraLinearKernel(Product product) {
  using Format = Format<storage>;
  constexpr int kTile = 8 * Format::kLaneOutputs, kRows = kRowTiles * kRowsPerTile;
  auto& memory = Shared<Memory<kRows, kTile>>();
  const int lane = static_cast<int>(threadIdx.x), warp = static_cast<int>(threadIdx.y);
  const int g = static_cast<int>(threadIdx.x / 4), t = static_cast<int>(threadIdx.x % 4);
  const int group = static_cast<int>(blockIdx.x), tile = static_cast<int>(blockIdx.y);
  const int split = static_cast<int>(blockIdx.z), splits = product.cut.splits;
  const int rows = product.rows, outputs = product.weight.outputs;
  const int first_row = group * kRows, output = tile * kTile + g * Format::kLaneOutputs;
  const int part = split * kWarps + warp, parts = splits * kWarps;
  const bool is_second = product.adapter_out.channels > 0;
  // The next launch may start now: it only fetches weights until this one has ended, and this one cannot end before
  // some of its blocks have waited for the first launch.
  if (is_second) AllowNext();

  auto& own = memory.sums[warp];
  TileSums<Format, kRowTiles>::ClearPlaces(own);
  const auto add = [&](const Weights& weights, const auto& input, int units, float (&of_rows)[kRowTiles]) {
    AddUnits<Format>(weights, input, Cut::Begin(units, part, parts), Cut::Begin(units, part + 1, parts), first_row,
                     output, own, of_rows);
  };
  float squares[kRowTiles] = {};
  add(product.weight, product.input, product.cut.weight_units, squares);
  if (product.measure) {
#pragma unroll
    for (int of_tile = 0; of_tile < kRowTiles; ++of_tile) {
      float sum = squares[of_tile];
      for (const int mask : {1, 2, kWarpSize / 2}) sum += ShuffleXor(sum, mask);
      if (t == 0 && g < kRowsPerTile) memory.squares[warp][of_tile * kRowsPerTile + g] = sum;
    }
  }
  const int adapter_units = product.cut.adapter_units;
  if (Cut::Begin(adapter_units, split * kWarps, parts) < Cut::Begin(adapter_units, (split + 1) * kWarps, parts)) {
    const GatedInput<kRows> gated = {product.gating, rows, first_row, &memory.gates};
    float none[kRowTiles] = {};
    add(product.adapter_out, gated, adapter_units, none);
  }
  SyncThreads();

  const int thread = lane + kWarpSize * warp;
  const int block_rows = Least(kRows, rows - first_row);
  float* const split_squares = product.squares + static_cast<int64_t>(tile) * splits * rows + first_row;
  const auto sum_of_warps = [&](int row, int column) {  // of four columns
    float4 sum = {};
    for (const auto& of_warp : memory.sums) Add(sum, *reinterpret_cast<const float4*>(&of_warp[row][column]));
    return sum;
  };
  const auto squares_of_warps = [&](int row) {
    float sum = 0.0f;
    for (const auto& of_warp : memory.squares) sum += of_warp[row];
    return sum;
  };
  // Writes four numbers of y, `left` of which are there.
  const auto finish = [&](int row, int to, const float4& sum, float inverse_norm) {
    const int left = outputs - to;
    const int64_t at = static_cast<int64_t>(first_row + row) * outputs + to;
    if (product.is_first) {
      if (product.measure && to == 0) product.inverse_norm[first_row + row] = inverse_norm;
      inverse_norm = 1.0f;
    }
    float4 result = {sum.x * inverse_norm, sum.y * inverse_norm, sum.z * inverse_norm, sum.w * inverse_norm};
    if (product.bias != nullptr) Add(result, LoadFour(product.bias + to, left, product.is_aligned));
    if (product.residual != nullptr) Add(result, LoadFour(product.residual + at, left, product.is_aligned));
    StoreFour(product.y + at, result, left, product.is_aligned);
  };
  // Calls take(row, column, to) for every four numbers of the tile; `to` is the first's column among all outputs.
  const auto each = [&](const auto& take) {
    constexpr int kFours = kTile / 4;
    for (int i = thread; i < block_rows * kFours; i += kWarpSize * kWarps) {
      const int column = i % kFours * 4, to = tile * kTile + column;
      if (to < outputs) take(i / kFours, column, to);
    }
  };
  const bool is_given = !product.measure && product.inverse_norm != nullptr;
  if (splits == 1) {
    if (is_given) WaitForPrevious();
    each([&](int row, int column, int to) {
      float inverse_norm = 1.0f;
      if (product.measure) inverse_norm = InverseNorm(product, squares_of_warps(row));
      if (is_given) inverse_norm = LoadFresh(product.inverse_norm + first_row + row);
      finish(row, to, sum_of_warps(row, column), inverse_norm);
    });
    return;
  }
  const auto partials = [&](int of_split, int row, int to) {
    return product.partials + static_cast<int64_t>(of_split * rows + first_row + row) * product.partial_stride + to;
  };
  each([&](int row, int column, int to) {
    *reinterpret_cast<float4*>(partials(split, row, to)) = sum_of_warps(row, column);
  });
  if (product.measure && thread < block_rows) split_squares[split * rows + thread] = squares_of_warps(thread);
  if (!IsLastBlock(product.counters + group * static_cast<int>(gridDim.y) + tile, splits, &memory.arrived, thread == 0))
    return;
  if (is_given) WaitForPrevious();
  each([&](int row, int, int to) {
    float inverse_norm = 1.0f;
    if (is_given) inverse_norm = LoadFresh(product.inverse_norm + first_row + row);
    const int64_t stride = static_cast<int64_t>(rows) * product.partial_stride;
    const auto sum = SumOfSplits<float4>(partials(0, row, to), stride, splits);
    if (product.measure) inverse_norm = InverseNorm(product, SumOfSplits<float>(split_squares + row, rows, splits));
    finish(row, to, sum, inverse_norm);
  });
}

// --- launches ---------------------------------------------------------------------------------------------------

int64_t TileOutputs(Storage storage) { return IsInteger(storage) ? 128 : 64; }
int64_t Tiles(const Matrix& matrix) { return CeilDivide(matrix.outputs, TileOutputs(matrix.storage)); }

// For a launch that starts while `beside` blocks of another still run.
Cut CutOf(const Matrix& matrix, int64_t adapter_channels = 0, int64_t beside = 0) {
  Cut cut;
  cut.weight_units = static_cast<int>(CeilDivide(matrix.channels, kUnit));
  cut.adapter_units = static_cast<int>(CeilDivide(adapter_channels, kUnit));
  const int64_t tiles = Tiles(matrix), alone = kTargetBlocks / tiles, together = (kTargetBlocks - beside) / tiles;
  // Two splits where these fit alone: with one, half of the machine would have nothing to do.
  const int64_t splits = std::max(together, std::min<int64_t>(alone, 2));
  const int64_t most = std::min<int64_t>(CeilDivide(cut.weight_units, kWarps), kMostSplits);
  cut.splits = static_cast<int>(std::clamp<int64_t>(splits, 1, most));
  return cut;
}

// The second launch's. Blocks that found no room beside the first's would begin when those have ended. Only integers
// leave them room: floats wait for bytes, of which more blocks have more on their way.
Cut SecondCut(const HLoraLinearArguments& given) {
  int64_t beside = 0;
  if (given.experts > 0 && IsInteger(given.weight.storage)) {
    beside = Tiles(given.adapter_in) * CutOf(given.adapter_in).splits;
  }
  return CutOf(given.weight, given.adapter_out.channels, beside);
}

int64_t PartialStride(const Matrix& matrix) { return CeilDivide(matrix.outputs, 4) * 4; }

Weights WeightsOf(const Matrix& matrix) {
  const int64_t load_bytes = matrix.storage == Storage::kInt4 ? 8 : 16;
  const int64_t row_bits = matrix.stride * StorageBits(matrix.storage);
  const bool is_aligned = row_bits % (8 * load_bytes) == 0 &&
                          reinterpret_cast<uintptr_t>(matrix.values) % static_cast<uintptr_t>(load_bytes) == 0 &&
                          // a lane's load may go past the last output, but not past the row
                          WideStride(matrix.storage, matrix.outputs) <= matrix.stride;
  const bool scales_are_aligned = matrix.outputs % 4 == 0 && reinterpret_cast<uintptr_t>(matrix.scales) % 16 == 0;
  int block_bits = 0;
  while (1 << block_bits < matrix.block_size) ++block_bits;
  return {matrix.values,
          matrix.scales,
          static_cast<int>(matrix.channels),
          static_cast<int>(matrix.outputs),
          matrix.stride,
          static_cast<uint32_t>(row_bits / 8),
          block_bits,
          is_aligned,
          scales_are_aligned};
}

// The workspace's layout, in floats from its start.
struct Places {
  int64_t first_counters, second_counters, low, inverse_norm, first_partials, first_squares, second_partials,
      second_squares, end;
};

Places PlacesOf(const HLoraLinearArguments& given) {
  Places places = {};
  const int64_t rows = given.rows, rank = given.adapter_out.channels;
  int64_t end = 0;
  const auto place = [&](int64_t count) {
    const int64_t at = end;
    end += CeilDivide(count, 4) * 4;
    return at;
  };
  places.first_counters = place(kMostCounters);
  places.second_counters = place(kMostCounters);
  places.inverse_norm = place(rows);
  if (given.experts > 0) {
    const Cut cut = CutOf(given.adapter_in);
    places.low = place(rows * (rank + given.experts));
    places.first_partials = place(cut.partials() * rows * PartialStride(given.adapter_in));
    places.first_squares = place(cut.partials() * rows * Tiles(given.adapter_in));
  }
  // By as many splits as the base alone may have, so that one workspace serves a linear with its adapters and without.
  const Cut cut = CutOf(given.weight);
  places.second_partials = place(cut.partials() * rows * PartialStride(given.weight));
  places.second_squares = place(cut.partials() * rows * Tiles(given.weight));
  places.end = end;
  return places;
}

Status CheckMatrix(const Matrix& matrix, Storage storage) {
  if (matrix.storage != storage) return "[hlora_linear] adapters must be stored as the weight is";
  if (storage == Storage::kFloat32) return "[hlora_linear] weights must be float16, bfloat16, int8 or int4";
  if (matrix.values == nullptr || matrix.channels < 1 || matrix.outputs < 1 || matrix.stride < matrix.outputs) {
    return "[hlora_linear] a matrix must hold numbers, its stride at least its outputs";
  }
  if (matrix.channels > kMostChannels) return "[hlora_linear] a matrix must have at most 2^25 channels";
  if (Tiles(matrix) > kMostBlocksYZ || matrix.channels * matrix.stride * StorageBits(storage) / 8 > UINT32_MAX) {
    return "[hlora_linear] a matrix must have fewer than 4 GiB, and 4 million outputs at most";
  }
  if (IsInteger(storage) && matrix.block_size != 32 && matrix.block_size != 64 && matrix.block_size != 128) {
    return "[hlora_linear] block_size must be 32, 64 or 128";
  }
  if (IsInteger(storage) && matrix.scales == nullptr) return "[hlora_linear] integers must come with scales";
  if (storage == Storage::kBFloat16 && !HasBFloat16()) return "[hlora_linear] this GPU multiplies no bfloat16";
  return nullptr;
}

template <Storage storage, int kRowTiles = 1>
Status Start(const Product& product, Stream stream) {
  if constexpr (kRowTiles < MostRowTiles(storage)) {
    if (product.rows > kRowTiles * kRowsPerTile) return Start<storage, 2 * kRowTiles>(product, stream);
  }
  const Grid grid = {CeilDivide(product.rows, kRowTiles * kRowsPerTile),
                     CeilDivide(product.weight.outputs, TileOutputs(storage)), product.cut.splits};
  return Launch(HLoraLinearKernel<storage, kRowTiles>, grid, dim3(kWarpSize, kWarps), stream, product);
}

Status Start(const Product& product, Storage storage, Stream stream) {
  switch (storage) {
    case Storage::kFloat16:
      return Start<Storage::kFloat16>(product, stream);
    case Storage::kBFloat16:
      return Start<Storage::kBFloat16>(product, stream);
    case Storage::kInt8:
      return Start<Storage::kInt8>(product, stream);
    default:
      return Start<Storage::kInt4>(product, stream);
  }
}

}  // namespace

int64_t WideStride(Storage storage, int64_t outputs) {
  const int64_t of_lane = TileOutputs(storage) / 8;
  return CeilDivide(outputs, of_lane) * of_lane;
}

Status CheckOperands(const HLoraLinearArguments& given) {
  if (given.experts < 0 || given.experts > kMostExperts) return "[hlora_linear] experts must be 0 to 32";
  if (given.x == nullptr || given.y == nullptr) return "[hlora_linear] x and y must be given";
  if (const Status wrong = CheckMatrix(given.weight, given.weight.storage)) return wrong;
  if (given.experts == 0) {
    return given.adapter_out.channels != 0 ? "[hlora_linear] adapters come with experts" : nullptr;
  }
  for (const Matrix* adapter : {&given.adapter_in, &given.adapter_out}) {
    if (const Status wrong = CheckMatrix(*adapter, given.weight.storage)) return wrong;
  }
  if (given.expert_of == nullptr && given.adapter_out.channels % given.experts != 0) {
    return "[hlora_linear] rank must be a multiple of experts";
  }
  if (given.adapter_in.channels != given.weight.channels || given.adapter_out.outputs != given.weight.outputs ||
      given.adapter_in.outputs != given.adapter_out.channels + given.experts) {
    return "[hlora_linear] adapter_in must be (C, R + E) and adapter_out (R, O)";
  }
  return nullptr;
}

int64_t HLoraLinearWorkspaceBytes(const HLoraLinearArguments& arguments) { return 4 * PlacesOf(arguments).end; }

Status HLoraLinear(const HLoraLinearArguments& given, Stream stream) {
  if (given.rows < 1 || given.rows > kMostDecodeRows) return "[hlora_linear] rows must be 1 to 32";
  if (const Status wrong = CheckOperands(given)) return wrong;
  if (given.workspace == nullptr || given.workspace_bytes < HLoraLinearWorkspaceBytes(given)) {
    return "[hlora_linear] the workspace is too small";
  }
  if (reinterpret_cast<uintptr_t>(given.workspace) % 16 != 0) {
    return "[hlora_linear] the workspace must lie at a multiple of 16 bytes";
  }
  const Places places = PlacesOf(given);
  float* const memory = static_cast<float*>(given.workspace);
  const auto counters = [&](int64_t place) { return static_cast<int*>(given.workspace) + place; };
  const int64_t channels = given.weight.channels, rank = given.adapter_out.channels;

  Product product = {};
  product.rows = static_cast<int>(given.rows);
  product.input.x = given.x;
  product.input.rows = product.rows;
  product.input.channels = static_cast<int>(channels);
  product.input.stride = static_cast<int>(given.pair_input ? 2 * channels : channels);
  product.input.is_pair = given.pair_input;
  product.input.is_aligned = channels % 4 == 0 && reinterpret_cast<uintptr_t>(given.x) % 16 == 0;
  product.input.waits = true;  // a second launch need not: it starts after the first has passed this wait
  product.measure = given.normalise;
  product.epsilon = given.epsilon;
  product.inverse_norm = given.normalise ? memory + places.inverse_norm : nullptr;
  if (given.experts > 0) {
    Product first = product;
    first.is_first = true;
    first.weight = WeightsOf(given.adapter_in);
    first.cut = CutOf(given.adapter_in);
    first.y = memory + places.low;
    first.is_aligned = given.adapter_in.outputs % 4 == 0;
    first.partial_stride = static_cast<int>(PartialStride(given.adapter_in));
    first.partials = memory + places.first_partials;
    first.squares = memory + places.first_squares;
    first.counters = counters(places.first_counters);
    if (const Status wrong = Start(first, given.weight.storage, stream)) return wrong;
    product.measure = false;
    product.input.waits = false;
    product.adapter_out = WeightsOf(given.adapter_out);
    Gating& gating = product.gating;
    gating.low = memory + places.low;
    gating.inverse_norm = product.inverse_norm;
    gating.route_bias = given.route_bias;
    gating.expert_of = given.expert_of;
    gating.rank = static_cast<int>(rank);
    gating.experts = static_cast<int>(given.experts);
    gating.stride = gating.rank + gating.experts;
    gating.columns = gating.rank / gating.experts;
    gating.is_aligned = gating.rank % 4 == 0 && gating.experts % 4 == 0;  // z itself is aligned
    gating.four_share = gating.expert_of == nullptr && gating.columns % 4 == 0;
  }
  product.weight = WeightsOf(given.weight);
  product.cut = SecondCut(given);
  product.bias = given.bias;
  product.residual = given.residual;
  product.y = given.y;
  product.is_aligned = given.weight.outputs % 4 == 0;
  for (const void* const array : {static_cast<const float*>(given.y), given.bias, given.residual}) {
    product.is_aligned = product.is_aligned && reinterpret_cast<uintptr_t>(array) % 16 == 0;
  }
  product.partial_stride = static_cast<int>(PartialStride(given.weight));
  product.partials = memory + places.second_partials;
  product.squares = memory + places.second_squares;
  product.counters = counters(places.second_counters);
  return Start(product, given.weight.storage, stream);
}

}  // namespace healthgpt::cuda
