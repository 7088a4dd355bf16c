// Attention of a decode step, the context split over blocks (Dao et al., "Flash-Decoding", 2023).
//
// A chunk is 64 positions of a key/value head. A block takes one chunk after another. It loads a chunk's keys and
// values into registers, all at once, and appends the new tokens that belong there. For each row (a query head at a
// token) it computes the maximum, the sum and the weighted values of the softmax over the chunk. The last block of a
// head combines the chunks. Chunks are at fixed positions and every sum has a fixed order, so a row has the same bits
// in every call.
//
// Only queries, new tokens and the warps' results go through shared memory. The scales of int8 caches are multiplied
// into scores and attention weights.
#include <algorithm>
#include <cmath>

#include "cached_attention/rows.cuh"
#include "cached_attention/softmax.cuh"
#include "cuda/launch.cuh"

namespace healthgpt::cuda {
namespace {

constexpr int kPartsAtOnce = 6;          // loaded by a thread at once
constexpr int64_t kTargetBlocks = 528;   // four for each of Hopper's 132 multiprocessors
constexpr int64_t kMostCount = 1 << 25;  // positions of a cache, and heads: 32 bits also hold 32 tokens times these

// kRows rows at a time; 1 only if there is a single row, of a single token.
template <class Stored, int kRows>
struct Memory {
  NewRows<Stored, kRows == 1 ? 1 : static_cast<int>(kMostDecodeTokens)> fresh;
  alignas(16) float query[kRows][kSize];
  int positions[kRows];
  // The results of each warp.
  alignas(16) float values[kRows][kWarps][kSize];
  float largest[kRows][kWarps], sums[kRows][kWarps];
  int arrived;
};

// A chunk's results for a row: the weighted values, and the largest score with the sum of the weights.
struct Parts {
  float* values;     // (B, K, chunks, rows, padded head size)
  float* softmaxes;  // (B, K, chunks, rows, 2)
};

// Adds up each of kCount sums over a team. Lane l gets total number l % kCount.
template <int kCount>
__device__ inline float SumOverTeam(float (&sums)[kCount]) {
  const int lane = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
    const bool is_upper = (lane & half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float sent = is_upper ? sums[i] : sums[half + i], kept = is_upper ? sums[half + i] : sums[i];
      sums[i] = kept + ShuffleXor(sent, half);
    }
  }
  float sum = sums[0];
#pragma unroll
  for (int mask = kCount; mask < kTeam; mask *= 2) sum += ShuffleXor(sum, mask);
  return sum;
}

// The reverse: lane l has number l % kCount, and every lane of the team gets all kCount numbers.
template <int kCount>
__device__ inline void GiveToTeam(float own, float (&numbers)[kCount]) {
  const int lane = static_cast<int>(threadIdx.x);
  numbers[0] = own;
#pragma unroll
  for (int half = 1; half < kCount; half *= 2) {
    const bool is_upper = (lane & half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float other = ShuffleXor(numbers[i], half);
      numbers[half + i] = is_upper ? numbers[i] : other;
      numbers[i] = is_upper ? other : numbers[i];
    }
  }
}

// Puts a warp's results for a row into shared memory. `values` are the team's, `sum` is the warp's.
template <class Memory>
__device__ inline void Give(Memory& memory, int row, float largest, float sum, const float (&values)[kVector]) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  // The two teams of a warp add their values; each team stores one half of the numbers.
  const bool is_upper = lane >= kTeam;
  float4 both;
  float* const numbers = &both.x;
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    const float kept = is_upper ? values[kVector / 2 + i] : values[i];
    numbers[i] = kept + ShuffleXor(is_upper ? values[i] : values[kVector / 2 + i], kTeam);
  }
  *reinterpret_cast<float4*>(&memory.values[row][warp][FirstNumber() + (is_upper ? kVector / 2 : 0)]) = both;
  if (lane == 0) {
    memory.largest[row][warp] = largest;
    memory.sums[row][warp] = sum;
  }
}

// One number of a row, combined over all warps.
struct Found {
  float largest, sum, value;
};
template <class Memory>
__device__ inline Found Join(const Memory& memory, int row, int at) {
  Found found = {kNone, 0.0f, 0.0f};
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) found.largest = fmaxf(found.largest, memory.largest[row][warp]);
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    const float share = expf(memory.largest[row][warp] - Shift(found.largest));
    found.sum += share * memory.sums[row][warp];
    found.value += share * memory.values[row][warp][at];
  }
  return found;
}

// Attention of the rows whose queries are in shared memory to one chunk.
template <class Stored, int kRows>
__device__ inline void Attend(const Head& head, const Chunk<Stored>& chunk, int start, Memory<Stored, kRows>& memory) {
  constexpr bool kHasScales = sizeof(Stored) == 1;
  float scores[kRows][kKeys] = {};
  // Half of the numbers at a time, because of the registers.
#pragma unroll
  for (int at = 0; at < kVector; at += kVector / 2) {
    float4 queries[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      queries[row] = *reinterpret_cast<const float4*>(&memory.query[row][FirstNumber() + at]);
    }
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      const Vector<Stored>& keys = chunk.keys[k];
      const float x = NumberOf(keys, at), y = NumberOf(keys, at + 1), z = NumberOf(keys, at + 2),
                  w = NumberOf(keys, at + 3);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        float& score = scores[row][k];
        score += x * queries[row].x;
        score += y * queries[row].y;
        score += z * queries[row].z;
        score += w * queries[row].w;
      }
    }
  }
  const int position = OwnPosition(start);
  float shares[kRows][kKeys], largest[kRows], sums[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    float score = SumOverTeam(scores[row]);
    if constexpr (kHasScales) score *= chunk.key_scale;
    const int distance = memory.positions[row] - position;
    const bool is_seen = distance >= 0 && (head.window == 0 || distance <= head.window) && position < head.capacity;
    if (!is_seen) score = kNone;
    largest[row] = WarpMax(score);
    const float share = expf(score - Shift(largest[row]));
    sums[row] = WarpSum(share) * (static_cast<float>(kKeys) / kTeam);  // kTeam / kKeys lanes have the same position
    GiveToTeam(kHasScales ? share * chunk.value_scale : share, shares[row]);
  }
  float values[kRows][kVector] = {};
#pragma unroll
  for (int k = 0; k < kKeys; ++k) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float number = NumberOf(chunk.values[k], i);
#pragma unroll
      for (int row = 0; row < kRows; ++row) values[row][i] += shares[row][k] * number;
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) Give(memory, row, largest[row], sums[row], values[row]);
}

// Combines the chunks' results of rows [begin, begin + kRows). Each team takes its share of the chunks.
template <class Stored, int kRows>
__device__ inline void Gather(const Head& head, const Parts& parts, int chunks, int begin,
                              Memory<Stored, kRows>& memory) {
  constexpr int kSteps = (kPartsAtOnce + kRows - 2) / kRows;
  const int at = FirstNumber(), lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t first = static_cast<int64_t>(head.index) * chunks * head.rows + begin;
  float largest[kRows], sums[kRows] = {}, values[kRows][kVector] = {};
#pragma unroll
  for (int row = 0; row < kRows; ++row) largest[row] = kNone;
  for (int c = head.first_chunk + lane; c < head.end_chunk; c += kWarpSize) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (begin + row >= head.rows) continue;
      const float* const of_part = parts.softmaxes + 2 * (first + static_cast<int64_t>(c) * head.rows + row);
      largest[row] = fmaxf(largest[row], LoadFresh(of_part));
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) largest[row] = WarpMax(largest[row]);
  // Which chunks belong to a team does not depend on the first chunk.
  for (int from = head.first_chunk / kTeams * kTeams + TeamIndex(); from < head.end_chunk; from += kTeams * kSteps) {
    float4 numbers[kSteps][kRows][2];
    float largest_of[kSteps][kRows], sum_of[kSteps][kRows];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int c = from + step * kTeams;
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        numbers[step][row][0] = numbers[step][row][1] = {0.0f, 0.0f, 0.0f, 0.0f};
        largest_of[step][row] = kNone;
        sum_of[step][row] = 0.0f;
        if (c < head.first_chunk || c >= head.end_chunk || begin + row >= head.rows) continue;
        const int64_t part = first + static_cast<int64_t>(c) * head.rows + row;
        largest_of[step][row] = LoadFresh(parts.softmaxes + 2 * part);
        sum_of[step][row] = LoadFresh(parts.softmaxes + 2 * part + 1);
        if (at >= head.stride) continue;
        const auto* const from_part = reinterpret_cast<const float4*>(parts.values + part * head.stride + at);
        numbers[step][row][0] = LoadFresh(from_part);
        numbers[step][row][1] = LoadFresh(from_part + 1);
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const float share = expf(largest_of[step][row] - Shift(largest[row]));
        sums[row] += share * sum_of[step][row];
        const float4 low = numbers[step][row][0], high = numbers[step][row][1];
        const float eight[kVector] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[row][i] += share * eight[i];
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    Give(memory, row, largest[row], sums[row] + ShuffleXor(sums[row], kTeam), values[row]);
  }
}

// Blocks per multiprocessor: as many as the registers of every architecture allow without spills.
constexpr int LeastBlocks(int rows) { return rows == 1 ? 4 : rows == 4 ? 3 : 2; }

template <Storage storage, int kRows>
__global__ void __launch_bounds__(kThreads, LeastBlocks(kRows))
    CachedAttentionKernel(CachedAttentionArguments given, Piece piece, int* counters, Parts parts) {
  using Stored = typename StoredAs<storage>::Type;
  auto& memory = Shared<Memory<Stored, kRows>>();
  WaitForPrevious();
  AllowNext();
  const Head head = HeadOf<kRows>(given, piece);
  const int first = head.first_chunk + static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  if (first >= head.end_chunk) return;
  Stored* const keys = static_cast<Stored*>(given.keys) + head.first_row * head.size;
  Stored* const values = static_cast<Stored*>(given.values) + head.first_row * head.size;
  const int pair = static_cast<int>(threadIdx.x) % kPairs, number = static_cast<int>(threadIdx.x) % kSize;

  for (int c = first; c < head.end_chunk; c += blocks) {
    const int start = c * kChunk;
    const NewTokens tokens = NewTokensIn(head, start);
    Chunk<Stored> chunk;
    LoadOld(head, keys, values, start, chunk);
    if constexpr (storage == Storage::kInt8) {
      chunk.key_scale = chunk.value_scale = 0.0f;
      if (const int position = OwnPosition(start); position < head.past) {
        chunk.key_scale = given.key_scales[head.first_row + position];
        chunk.value_scale = given.value_scales[head.first_row + position];
      }
    }
    for (int begin = 0; begin < head.rows; begin += kRows) {
      // Loaded before the new tokens are stored, so that no load waits for the stores.
      constexpr int kLoads = (kRows * kPairs + kThreads - 1) / kThreads;
      Pair loaded[kLoads] = {};
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int row = begin + i * (kThreads / kPairs) + static_cast<int>(threadIdx.x) / kPairs;
        if (pair >= head.half || row >= head.rows || row >= begin + kRows) continue;
        const int64_t token = head.first_token + row / head.group, query = head.first_query + row % head.group;
        if (pair == 0) memory.positions[row - begin] = head.past + row / head.group;
        loaded[i] = LoadPair(given, head, given.query + token * given.query_stride + query * head.size, token, pair);
      }
      if (begin == 0) Append(given, head, keys, values, tokens, memory.fresh);
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int row = i * (kThreads / kPairs) + static_cast<int>(threadIdx.x) / kPairs;
        if (row >= kRows) continue;
        const bool is_inside = pair < head.half;  // zeros past the head's end
        memory.query[row][is_inside ? pair : 2 * pair] = loaded[i].turned_first() * piece.scale;
        memory.query[row][is_inside ? head.half + pair : 2 * pair + 1] = loaded[i].turned_second() * piece.scale;
      }
      SyncThreads();
      if (begin == 0) TakeNew(tokens, start, memory.fresh, chunk);
      Attend(head, chunk, start, memory);
      SyncThreads();
      // Meanwhile other warps may already store the next queries: these were read before the barrier.
      for (int row = static_cast<int>(threadIdx.x) / kSize; row < kRows && begin + row < head.rows;
           row += kThreads / kSize) {
        const int64_t part = (static_cast<int64_t>(head.index) * piece.chunks + c) * head.rows + begin + row;
        const Found found = Join(memory, row, number);
        if (number < head.stride) parts.values[part * head.stride + number] = found.value;
        if (number < 2) parts.softmaxes[2 * part + number] = number == 0 ? found.largest : found.sum;
      }
    }
  }

  const int chunks = head.end_chunk - head.first_chunk;
  if (!IsLastBlock(counters + head.index, Least(chunks, blocks), &memory.arrived, threadIdx.x == 0)) return;
  for (int begin = 0; begin < head.rows; begin += kRows) {
    Gather(head, parts, piece.chunks, begin, memory);
    SyncThreads();
    for (int row = static_cast<int>(threadIdx.x) / kSize; row < kRows && begin + row < head.rows;
         row += kThreads / kSize) {
      const int64_t token = head.first_token + (begin + row) / head.group;
      const int64_t query = head.first_query + (begin + row) % head.group;
      const Found found = Join(memory, row, number);
      if (number < head.size) {
        given.output[(token * given.heads + query) * head.size + number] = found.value / found.sum;
      }
    }
    if (begin + kRows < head.rows) SyncThreads();  // before the next rows overwrite the values
  }
}

// --- the call ---------------------------------------------------------------------------------------------------

int64_t CounterBytes(const CachedAttentionArguments& given) {
  return CeilDivide(given.batch * given.kv_heads * 4, 16) * 16;
}

// The sizes of all parts of a launch of `tokens` tokens.
struct PartSizes {
  int64_t count, values;
};
PartSizes PartSizesOf(const CachedAttentionArguments& given, int64_t tokens) {
  const int64_t count = CeilDivide(given.capacity, kChunk) * given.batch * tokens * given.heads;
  return {count, count * CeilDivide(given.head_size, kVector) * kVector};
}

template <int kRows>
auto KernelOf(Storage cache) {
  return cache == Storage::kFloat16    ? CachedAttentionKernel<Storage::kFloat16, kRows>
         : cache == Storage::kBFloat16 ? CachedAttentionKernel<Storage::kBFloat16, kRows>
                                       : CachedAttentionKernel<Storage::kInt8, kRows>;
}

}  // namespace

Status CheckOperands(const CachedAttentionArguments& given) {
  if (given.batch < 1 || given.tokens < 1) return "[cached_attention] there must be tokens, of one sequence or more";
  if (given.kv_heads < 1 || given.heads < 1 || given.heads % given.kv_heads != 0) {
    return "[cached_attention] heads must be a multiple of kv_heads";
  }
  if (given.head_size < 2 || given.head_size % 2 != 0 || given.head_size > kMostHeadSize) {
    return "[cached_attention] the head size must be even and at most 128";
  }
  if (given.capacity < 1 || given.window < 0) {
    return "[cached_attention] capacity must be positive, window not negative";
  }
  if (given.capacity > kMostCount || given.batch > kMostCount / given.heads) {
    return "[cached_attention] the capacity, and the heads of all sequences, must be at most 2^25";
  }
  if (given.cache != Storage::kFloat16 && given.cache != Storage::kBFloat16 && given.cache != Storage::kInt8) {
    return "[cached_attention] caches must be float16, bfloat16 or int8";
  }
  if ((given.cache == Storage::kInt8) != (given.key_scales != nullptr && given.value_scales != nullptr)) {
    return "[cached_attention] int8 caches, and no others, must come with scales";
  }
  return nullptr;
}

int64_t CachedAttentionWorkspaceBytes(const CachedAttentionArguments& given) {
  const PartSizes sizes = PartSizesOf(given, std::min(given.tokens, kMostDecodeTokens));
  return CounterBytes(given) + (sizes.values + 2 * sizes.count) * 4;
}

Status CachedAttention(const CachedAttentionArguments& given, Stream stream) {
  if (const Status wrong = CheckOperands(given)) return wrong;
  if (given.workspace == nullptr || given.workspace_bytes < CachedAttentionWorkspaceBytes(given)) {
    return "[cached_attention] the workspace is too small";
  }
  const int64_t group = given.heads / given.kv_heads, chunks = CeilDivide(given.capacity, kChunk);
  const int64_t blocks = std::min(chunks, CeilDivide(kTargetBlocks, given.batch * given.kv_heads));
  const float scale = 1.0f / std::sqrt(static_cast<float>(given.head_size));
  const Grid grid = {blocks, given.kv_heads, given.batch};
  int* const counters = static_cast<int*>(given.workspace);
  float* const values = static_cast<float*>(given.workspace) + CounterBytes(given) / 4;
  for (int64_t first = 0; first < given.tokens; first += kMostDecodeTokens) {
    const int64_t tokens = std::min(given.tokens - first, kMostDecodeTokens), rows = tokens * group;
    const Piece piece = {first, static_cast<int>(tokens), static_cast<int>(group), static_cast<int>(chunks), scale};
    const Parts parts = {values, values + PartSizesOf(given, tokens).values};
    const auto kernel = rows == 1       ? KernelOf<1>(given.cache)
                        : rows % 4 == 0 ? KernelOf<4>(given.cache)
                                        : KernelOf<5>(given.cache);
    const Status wrong = Launch(kernel, grid, dim3(kThreads), stream, given, piece, counters, parts);
    if (wrong != nullptr) return wrong;
  }
  return nullptr;
}

}  // namespace healthgpt::cuda
