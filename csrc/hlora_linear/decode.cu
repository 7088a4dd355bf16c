// The H-LoRA linear of a decode step, in two launches of one kernel: z = x [A;R], then y = [W|B] [x; gate * z].
//
// B's rows continue W's: the channels of [W|B] are one range, cut into splits by the shape alone, and each split of
// each tile of outputs is a block's. Its warps take parts of it; their sums are added in order, and the last block of a
// tile adds the splits in order. So a row's bits depend on no other row and on no schedule. On Hopper the second launch
// starts while the first runs: it needs z only when it comes to B.
#include "cuda/launch.cuh"
#include "hlora_linear/cuda.h"
#include "hlora_linear/weights.cuh"

namespace healthgpt::cuda {
namespace {

constexpr int kWarps = 4;                 // of a block, along the channels
constexpr int kRowsPerTile = 8;           // of x: the tensor cores' smaller side
constexpr int kMostRowTiles = 2;          // of a block: more would leave its threads too few registers
constexpr int kUnit = 2 * kStepChannels;  // channels that a warp takes at a time
constexpr int64_t kTargetBlocks = 528;    // at most, four for each of Hopper's 132 multiprocessors
constexpr int64_t kMostTiles = 8192;      // those of all rows

// How the channels of [W|B] are cut.
struct Cut {
  int64_t weight_units, units, splits;
  __device__ int64_t begin(int64_t part) const { return units * part / (splits * kWarps); }
};

struct Product {
  int64_t rows;
  const float* x;  // (rows, x_stride)
  int64_t x_stride;
  bool pair_input;
  bool x_is_aligned;
  Weights weight, adapter_out;  // adapter_out has no channels in the first launch
  Cut cut;
  bool is_first;  // the launch that makes z: what it multiplies is not normalised yet
  bool measure;   // finds x's norm; the second launch of two gets it from the first
  float epsilon;
  float* inverse_norm;  // (rows)
  const float* low;     // z (rows, rank + experts), read in the second launch
  int64_t rank, experts;
  const int32_t* expert_of;
  const float* route_bias;
  const float* bias;
  const float* residual;
  float* y;         // (rows, outputs); z in the first launch
  float* partials;  // (splits, rows, outputs)
  float* squares;   // (tiles, splits, rows)
  int* counters;    // (tiles)
};

template <int kSums>
struct Memory {
  float sums[kMostRowTiles][2][kSums][kWarpSize];
  float squares[kWarps][kMostRowTiles * kRowsPerTile];
  float inverse_norm[kMostRowTiles * kRowsPerTile];
  int arrived;
};

// --- what is multiplied -----------------------------------------------------------------------------------------

__device__ inline float SiluGate(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

// Four channels of a row of x. (The second launch of two has not waited for whoever wrote x: the first has.)
__device__ inline void LoadInput(const Product& product, int64_t row, int64_t channel, float (&values)[4]) {
  const float* at = product.x + row * product.x_stride + channel;
  const int64_t channels = product.weight.channels, left = channels - channel;
  float up[4] = {};
  if (product.x_is_aligned && left >= 4) {
    const float4 word = LoadFresh(reinterpret_cast<const float4*>(at));
    values[0] = word.x, values[1] = word.y, values[2] = word.z, values[3] = word.w;
    if (product.pair_input) {
      const float4 other = LoadFresh(reinterpret_cast<const float4*>(at + channels));
      up[0] = other.x, up[1] = other.y, up[2] = other.z, up[3] = other.w;
    }
  } else {
    for (int i = 0; i < 4; ++i) {
      values[i] = i < left ? LoadFresh(at + i) : 0.0f;
      if (product.pair_input) up[i] = i < left ? LoadFresh(at + channels + i) : 0.0f;
    }
  }
  if (!product.pair_input) return;
  for (int i = 0; i < 4; ++i) values[i] = SiluGate(values[i], up[i]);
}

// The softmax of a row's routes.
struct Gate {
  const float* routes;
  const float* bias;
  float scale, largest, inverse_sum;

  __device__ float Route(int64_t expert) const {
    const float route = LoadFresh(routes + expert) * scale;
    return bias == nullptr ? route : route + LoadFresh(bias + expert);
  }
  __device__ float operator()(int64_t expert) const { return expf(Route(expert) - largest) * inverse_sum; }
};

__device__ inline Gate RowGate(const Product& product, int64_t row) {
  const float* const routes = product.low + row * (product.rank + product.experts) + product.rank;
  Gate gate = {routes, product.route_bias, 1.0f, 0.0f, 1.0f};
  if (product.inverse_norm != nullptr) gate.scale = LoadFresh(product.inverse_norm + row);
  float largest = gate.Route(0), sum = 0.0f;
  for (int64_t i = 1; i < product.experts; ++i) largest = fmaxf(largest, gate.Route(i));
  gate.largest = largest;
  for (int64_t i = 0; i < product.experts; ++i) sum += gate(i);
  gate.inverse_sum = 1.0f / sum;
  return gate;
}

// Four channels of a row of gate * z.
__device__ inline void LoadGated(const Product& product, const Gate& gate, int64_t row, int64_t channel,
                                 float (&values)[4]) {
  const float* at = product.low + row * (product.rank + product.experts);
  for (int i = 0; i < 4; ++i) {
    const int64_t here = channel + i;
    values[i] = 0.0f;
    if (here >= product.rank) continue;
    const int64_t expert =
        product.expert_of == nullptr ? here * product.experts / product.rank : product.expert_of[here];
    values[i] = LoadFresh(at + here) * gate(expert);
  }
}

// As the sum of two numbers of 16 bits each.
template <class Number>
__device__ inline void Split(const float (&values)[4], Right* high, Right* low) {
  Number first[4], rest[4];
  for (int i = 0; i < 4; ++i) {
    first[i] = Round(values[i], Number());
    rest[i] = Round(values[i] - ToFloat(first[i]), Number());
  }
  *high = {Pack(first[0], first[1]), Pack(first[2], first[3])};
  *low = {Pack(rest[0], rest[1]), Pack(rest[2], rest[3])};
}

// --- a warp's part ----------------------------------------------------------------------------------------------

// One unit of channels, from `channel` on. load(channel, values) gives four of this lane's row.
template <class Format, class Load>
__device__ inline void AddUnit(const Weights& weights, int64_t channel, int64_t output, const Load& load,
                               Sums (&sums)[Format::kLaneOutputs / 2]) {
  constexpr int kSteps = kUnit / kStepChannels;
  constexpr int kWords = sizeof(typename Format::Word) / 4;
  const int t = static_cast<int>(threadIdx.x) % 4;
  uint32_t words[kSteps][4][kWords];
  // All loads of the unit are on their way before the first is used.
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      LoadChannel<Format>(weights, channel + step * kStepChannels + 4 * t + c, output, words[step][c]);
    }
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    float values[4];
    load(channel + step * kStepChannels + 4 * t, values);
    Right high, low;
    Split<typename Format::Number>(values, &high, &low);
#pragma unroll
    for (int j = 0; j < Format::kLaneOutputs / 2; j += Format::kUnpacked) {
      Left left[Format::kUnpacked];
      Format::Unpack(words[step], j / Format::kUnpacked, left);
#pragma unroll
      for (int i = 0; i < Format::kUnpacked; ++i) {
        MultiplyAdd(sums[j + i], left[i], high, typename Format::Number());
        MultiplyAdd(sums[j + i], left[i], low, typename Format::Number());
      }
    }
  }
}

// Units [begin, end) of one matrix added to the totals, the integers' scales applied once per block of them.
template <class Format, class Load>
__device__ inline void AddUnits(const Weights& weights, int64_t begin, int64_t end, int64_t output, const Load& load,
                                Sums (&totals)[Format::kLaneOutputs / 2]) {
  if constexpr (!Format::kIsInteger) {
    for (int64_t unit = begin; unit < end; ++unit) AddUnit<Format>(weights, unit * kUnit, output, load, totals);
  } else {
    const int64_t units_per_block = weights.block_size / kUnit;
    for (int64_t unit = begin; unit < end;) {
      Sums sums[Format::kLaneOutputs / 2] = {};
      const int64_t block = unit / units_per_block, block_end = Min(end, (block + 1) * units_per_block);
      for (; unit < block_end; ++unit) AddUnit<Format>(weights, unit * kUnit, output, load, sums);
      const float* scales = weights.scales + block * weights.outputs + output;
#pragma unroll
      for (int j = 0; j < Format::kLaneOutputs / 2; ++j) {
        const float even = output + 2 * j < weights.outputs ? LoadOnce<float>(scales + 2 * j) : 0.0f;
        const float odd = output + 2 * j + 1 < weights.outputs ? LoadOnce<float>(scales + 2 * j + 1) : 0.0f;
        totals[j].values[0] += even * sums[j].values[0];
        totals[j].values[1] += even * sums[j].values[1];
        totals[j].values[2] += odd * sums[j].values[2];
        totals[j].values[3] += odd * sums[j].values[3];
      }
    }
  }
}

// --- a block's part ---------------------------------------------------------------------------------------------

// The warps' sums into those of the first.
template <int kProducts, class Memory>
__device__ inline void AddWarps(Memory& memory, Sums (&sums)[kProducts]) {
  const auto exchange = [&](unsigned from, unsigned count) {
    auto& slots = memory.sums[threadIdx.z];
    if (threadIdx.y >= from && threadIdx.y < from + count) {
      for (int i = 0; i < 4 * kProducts; ++i) {
        slots[threadIdx.y - from][i][threadIdx.x] = sums[i / 4].values[i % 4];
      }
    }
    SyncThreads();
    if (threadIdx.y < count) {
      for (int i = 0; i < 4 * kProducts; ++i) sums[i / 4].values[i % 4] += slots[threadIdx.y][i][threadIdx.x];
    }
  };
  static_assert(kWarps == 4);
  exchange(2, 2);
  SyncThreads();
  exchange(1, 1);
}

template <Storage storage>
__global__ void __launch_bounds__(kWarpSize * kWarps * kMostRowTiles, 1) HLoraLinearKernel(Product product) {
  using Format = Format<storage>;
  constexpr int kProducts = Format::kLaneOutputs / 2, kTile = 8 * Format::kLaneOutputs;
  auto& memory = Shared<Memory<4 * kProducts>>();
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  const int64_t tile = blockIdx.x, split = blockIdx.y, rows = product.rows, outputs = product.weight.outputs;
  const int64_t first_row = blockIdx.z * kMostRowTiles * kRowsPerTile;  // of the block
  const int64_t warp_row = first_row + threadIdx.z * kRowsPerTile, row = warp_row + g;
  const int64_t output = tile * kTile + g * Format::kLaneOutputs;
  const int64_t part = split * kWarps + threadIdx.y, weight_units = product.cut.weight_units;
  const int64_t begin = product.cut.begin(part), end = product.cut.begin(part + 1);
  const bool is_second = product.adapter_out.channels > 0;
  if (!is_second) {  // the second launch starts when the first has passed here: then x is there
    WaitForPrevious();
    AllowNext();
  }

  Sums sums[kProducts] = {};
  float squares = 0.0f;
  const auto load_input = [&](int64_t channel, float (&values)[4]) {
    for (float& value : values) value = 0.0f;
    if (row < rows && channel < product.weight.channels) LoadInput(product, row, channel, values);
    for (const float value : values) squares += value * value;
  };
  AddUnits<Format>(product.weight, Min(begin, weight_units), Min(end, weight_units), output, load_input, sums);
  if (end > weight_units) {
    WaitForPrevious();
    AllowNext();
    const Gate gate = row < rows ? RowGate(product, row) : Gate();
    const auto load_gated = [&](int64_t channel, float (&values)[4]) {
      for (float& value : values) value = 0.0f;
      if (row < rows) LoadGated(product, gate, row, channel, values);
    };
    AddUnits<Format>(product.adapter_out, Max(begin, weight_units) - weight_units, end - weight_units, output,
                     load_gated, sums);
  }

  AddWarps(memory, sums);
  if (threadIdx.y == 0) {
    for (int i = 0; i < 4 * kProducts; ++i) {
      const int64_t to_row = warp_row + 2 * t + i % 2, to = output + i / 4 * 2 + i % 4 / 2;
      if (to_row < rows && to < outputs) {
        product.partials[(split * rows + to_row) * outputs + to] = sums[i / 4].values[i % 4];
      }
    }
  }
  float* const split_squares = product.squares + tile * product.cut.splits * rows;
  if (product.measure) {
    squares += ShuffleXor(squares, 1);
    squares += ShuffleXor(squares, 2);
    if (t == 0) memory.squares[threadIdx.y][row - first_row] = squares;
    SyncThreads();
    if (t == 0 && threadIdx.y == 0 && row < rows) {
      float sum = 0.0f;
      for (const auto& of_warp : memory.squares) sum += of_warp[row - first_row];
      split_squares[split * rows + row] = sum;
    }
  }

  const auto thread = static_cast<int>(threadIdx.x + kWarpSize * (threadIdx.y + kWarps * threadIdx.z));
  const int threads = kWarpSize * kWarps * static_cast<int>(blockDim.z);
  const auto splits = static_cast<int>(product.cut.splits);
  int* const counter = product.counters + blockIdx.z * gridDim.x + tile;
  if (!IsLastBlock(counter, splits, &memory.arrived, thread == 0)) return;
  const int64_t block_rows = Min(kMostRowTiles * kRowsPerTile, rows - first_row);
  if (thread < block_rows) {
    const int64_t of_row = first_row + thread;
    float inverse_norm = 1.0f;
    if (product.measure) {
      float sum = 0.0f;
      for (int i = 0; i < splits; ++i) sum += LoadFresh(split_squares + i * rows + of_row);
      inverse_norm = 1.0f / sqrtf(sum / static_cast<float>(product.weight.channels) + product.epsilon);
      if (product.is_first && tile == 0) product.inverse_norm[of_row] = inverse_norm;
    } else if (product.inverse_norm != nullptr) {
      WaitForPrevious();
      inverse_norm = LoadFresh(product.inverse_norm + of_row);
    }
    memory.inverse_norm[thread] = product.is_first ? 1.0f : inverse_norm;
  }
  SyncThreads();
  for (int64_t i = thread; i < block_rows * kTile; i += threads) {
    const int64_t of_row = first_row + i / kTile, from = tile * kTile + i % kTile;
    if (from >= outputs) continue;
    float sum = 0.0f;
    for (int of_split = 0; of_split < splits; ++of_split) {
      sum += LoadFresh(product.partials + (of_split * rows + of_row) * outputs + from);
    }
    sum *= memory.inverse_norm[of_row - first_row];
    if (product.bias != nullptr) sum += LoadOnce<float>(product.bias + from);
    if (product.residual != nullptr) sum += product.residual[of_row * outputs + from];
    product.y[of_row * outputs + from] = sum;
  }
}

// --- launches ---------------------------------------------------------------------------------------------------

bool IsInteger(Storage storage) { return storage == Storage::kInt8 || storage == Storage::kInt4; }
int64_t ElementBits(Storage storage) { return storage == Storage::kInt4 ? 4 : storage == Storage::kInt8 ? 8 : 16; }
int64_t TileOutputs(Storage storage) { return IsInteger(storage) ? 128 : 64; }
int64_t Tiles(const Matrix& matrix) { return CeilDivide(matrix.outputs, TileOutputs(matrix.storage)); }

Cut CutOf(const Matrix& matrix, int64_t adapter_channels) {
  Cut cut;
  cut.weight_units = CeilDivide(matrix.channels, kUnit);
  cut.units = cut.weight_units + CeilDivide(adapter_channels, kUnit);
  const int64_t wanted = kTargetBlocks / Tiles(matrix), most = CeilDivide(cut.units, kWarps);
  cut.splits = wanted < 1 ? 1 : wanted < most ? wanted : most;
  return cut;
}

Weights WeightsOf(const Matrix& matrix) {
  const int64_t load_bytes = matrix.storage == Storage::kInt4 ? 8 : 16;
  const int64_t row_bits = matrix.stride * ElementBits(matrix.storage);
  const bool is_aligned = row_bits % (8 * load_bytes) == 0 &&
                          reinterpret_cast<uintptr_t>(matrix.values) % static_cast<uintptr_t>(load_bytes) == 0 &&
                          // a lane's load may reach beyond the last output, not beyond the row
                          WideStride(matrix.storage, matrix.outputs) <= matrix.stride;
  return {matrix.values,  matrix.scales, matrix.channels,
          matrix.outputs, matrix.stride, static_cast<int>(matrix.block_size),
          is_aligned};
}

// What the workspace holds, in floats from its start.
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
  places.first_counters = place(kMostTiles);
  places.second_counters = place(kMostTiles);
  places.inverse_norm = place(rows);
  if (given.experts > 0) {
    const Cut cut = CutOf(given.adapter_in, 0);
    places.low = place(rows * (rank + given.experts));
    places.first_partials = place(cut.splits * rows * given.adapter_in.outputs);
    places.first_squares = place(Tiles(given.adapter_in) * cut.splits * rows);
  }
  const Cut cut = CutOf(given.weight, rank);
  places.second_partials = place(cut.splits * rows * given.weight.outputs);
  places.second_squares = place(Tiles(given.weight) * cut.splits * rows);
  places.end = end;
  return places;
}

Status CheckMatrix(const Matrix& matrix, Storage storage) {
  if (matrix.storage != storage) return "[hlora_linear] adapters must be stored as the weight is";
  if (storage == Storage::kFloat32) return "[hlora_linear] weights must be float16, bfloat16, int8 or int4";
  if (matrix.values == nullptr || matrix.channels < 1 || matrix.outputs < 1 || matrix.stride < matrix.outputs) {
    return "[hlora_linear] a matrix must hold numbers, its stride at least its outputs";
  }
  if (Tiles(matrix) * kMostDecodeRows > kMostTiles * kMostRowTiles * kRowsPerTile)
    return "[hlora_linear] a matrix has too many outputs";
  if (IsInteger(storage) && matrix.block_size != 32 && matrix.block_size != 64 && matrix.block_size != 128) {
    return "[hlora_linear] block_size must be 32, 64 or 128";
  }
  if (IsInteger(storage) && matrix.scales == nullptr) return "[hlora_linear] integers must come with scales";
  if (storage == Storage::kBFloat16 && !HasBFloat16()) return "[hlora_linear] this GPU multiplies no bfloat16";
  return nullptr;
}

Status Check(const HLoraLinearArguments& given) {
  if (given.rows < 1 || given.rows > kMostDecodeRows) return "[hlora_linear] rows must be 1 to 32";
  if (given.experts < 0 || given.experts > kMostExperts) return "[hlora_linear] experts must be 0 to 32";
  if (given.x == nullptr || given.y == nullptr || given.workspace == nullptr) {
    return "[hlora_linear] x, y and workspace must be given";
  }
  if (const Status wrong = CheckMatrix(given.weight, given.weight.storage)) return wrong;
  if (given.experts == 0 && given.adapter_out.channels != 0) return "[hlora_linear] adapters come with experts";
  if (given.experts > 0) {
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
  }
  if (given.workspace_bytes < HLoraLinearWorkspaceBytes(given)) return "[hlora_linear] the workspace is too small";
  return nullptr;
}

Status Start(const Product& product, Storage storage, Stream stream) {
  const auto tiles = static_cast<unsigned>(CeilDivide(product.weight.outputs, TileOutputs(storage)));
  const int64_t row_tiles = CeilDivide(product.rows, kRowsPerTile);
  const dim3 grid(tiles, static_cast<unsigned>(product.cut.splits),
                  static_cast<unsigned>(CeilDivide(row_tiles, kMostRowTiles)));
  const dim3 block(kWarpSize, kWarps, static_cast<unsigned>(row_tiles < kMostRowTiles ? row_tiles : kMostRowTiles));
  switch (storage) {
    case Storage::kFloat16:
      return Launch(HLoraLinearKernel<Storage::kFloat16>, grid, block, stream, product);
    case Storage::kBFloat16:
      return Launch(HLoraLinearKernel<Storage::kBFloat16>, grid, block, stream, product);
    case Storage::kInt8:
      return Launch(HLoraLinearKernel<Storage::kInt8>, grid, block, stream, product);
    default:
      return Launch(HLoraLinearKernel<Storage::kInt4>, grid, block, stream, product);
  }
}

}  // namespace

int64_t WideStride(Storage storage, int64_t outputs) {
  const int64_t of_lane = TileOutputs(storage) / 8;
  return CeilDivide(outputs, of_lane) * of_lane;
}

int64_t HLoraLinearWorkspaceBytes(const HLoraLinearArguments& arguments) { return 4 * PlacesOf(arguments).end; }

Status HLoraLinear(const HLoraLinearArguments& given, Stream stream) {
  if (const Status wrong = Check(given)) return wrong;
  const Places places = PlacesOf(given);
  float* const memory = static_cast<float*>(given.workspace);
  const auto counters = [&](int64_t place) { return static_cast<int*>(given.workspace) + place; };
  const int64_t channels = given.weight.channels, rank = given.adapter_out.channels;

  Product product = {};
  product.rows = given.rows;
  product.x = given.x;
  product.x_stride = given.pair_input ? 2 * channels : channels;
  product.pair_input = given.pair_input;
  product.x_is_aligned = channels % 4 == 0 && reinterpret_cast<uintptr_t>(given.x) % 16 == 0;
  product.measure = given.normalise;
  product.epsilon = given.epsilon;
  product.inverse_norm = given.normalise ? memory + places.inverse_norm : nullptr;
  if (given.experts > 0) {
    Product first = product;
    first.is_first = true;
    first.weight = WeightsOf(given.adapter_in);
    first.cut = CutOf(given.adapter_in, 0);
    first.y = memory + places.low;
    first.partials = memory + places.first_partials;
    first.squares = memory + places.first_squares;
    first.counters = counters(places.first_counters);
    if (const Status wrong = Start(first, given.weight.storage, stream)) return wrong;
    product.measure = false;
    product.adapter_out = WeightsOf(given.adapter_out);
    product.low = memory + places.low;
    product.rank = rank;
    product.experts = given.experts;
    product.expert_of = given.expert_of;
    product.route_bias = given.route_bias;
  }
  product.weight = WeightsOf(given.weight);
  product.cut = CutOf(given.weight, rank);
  product.bias = given.bias;
  product.residual = given.residual;
  product.y = given.y;
  product.partials = memory + places.second_partials;
  product.squares = memory + places.second_squares;
  product.counters = counters(places.second_counters);
  return Start(product, given.weight.storage, stream);
}

}  // namespace healthgpt::cuda
