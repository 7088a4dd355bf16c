// Attention of a decode step, the context split over blocks (Dao et al., "Flash-Decoding", 2023).
//
// A chunk of a key/value head is 64 positions. A block takes one after another: it fetches a chunk's keys and values
// into registers, all at once, appends those of the new tokens that fall there, and gives each row (a query head at a
// token) the maximum, the sum and the values of its softmax over them. The last block of a head puts the parts
// together. Chunks lie at fixed positions and every sum is made in a fixed order, so that a row's bits are alike in
// every call.
//
// A team of 16 threads holds one position's numbers, 8 to a thread, so that nothing but what the warps of a block found
// goes through shared memory. What a step of cached bytes is worth multiplies scores and shares.
#include <algorithm>

#include "cached_attention/cuda.h"
#include "cuda/launch.cuh"
#include "cuda/numbers.cuh"

namespace healthgpt::cuda {
namespace {

constexpr int kVector = 8;                                        // numbers of a position that a thread has
constexpr int kTeam = static_cast<int>(kMostHeadSize) / kVector;  // threads
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTeams = kThreads / kTeam;
constexpr int kKeys = 8;                // positions of a thread in a chunk
constexpr int kChunk = kTeams * kKeys;  // positions
constexpr int kSize = static_cast<int>(kMostHeadSize);
constexpr int kPairs = kSize / 2;
constexpr int kPartsAtOnce = 8;         // that a thread fetches
constexpr int64_t kTargetBlocks = 528;  // four for each of Hopper's 132 multiprocessors
constexpr float kNone = -INFINITY;

template <Storage storage>
struct StoredAs {
  using Type = Half;
};
template <>
struct StoredAs<Storage::kBFloat16> {
  using Type = BFloat16;
};
template <>
struct StoredAs<Storage::kInt8> {
  using Type = int8_t;
};

// Cached numbers of a thread, read at once.
template <class Stored>
struct alignas(kVector * sizeof(Stored)) Vector {
  uint32_t words[kVector * sizeof(Stored) / 4];
};

__device__ inline uint32_t BitsOf(Half number) { return number.bits; }
__device__ inline uint32_t BitsOf(BFloat16 number) { return number.bits; }
__device__ inline uint32_t BitsOf(int8_t number) { return static_cast<uint8_t>(number); }

template <class Stored>
__device__ inline void Widen(const Vector<Stored>& vector, float (&numbers)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    numbers[i] = ToFloat(Stored{static_cast<uint16_t>(vector.words[i / 2] >> (i % 2 * 16))});
  }
}
__device__ inline void Widen(const Vector<int8_t>& vector, float (&numbers)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    numbers[i] = static_cast<float>(static_cast<int8_t>(vector.words[i / 4] >> (i % 4 * 8)));
  }
}

// The new tokens of a chunk as the caches keep them, zeros behind a head.
template <class Stored, int kMost>
struct NewRows {
  alignas(16) Stored keys[kMost][kSize];
  alignas(16) Stored values[kMost][kSize];
  float key_scales[kMost], value_scales[kMost];  // of bytes alone
};

// kRows rows at once: one where there is but one, of one token.
template <class Stored, int kRows>
struct Memory {
  NewRows<Stored, kRows == 1 ? 1 : static_cast<int>(kMostDecodeTokens)> fresh;
  alignas(16) float query[kRows][kSize];
  // What each warp found.
  alignas(16) float values[kRows][kWarps][kSize];
  float largest[kRows][kWarps], sums[kRows][kWarps];
  int arrived;
};

// The tokens of one launch among those of the call.
struct Piece {
  int64_t first, count;
};

// What a chunk gives a row: its values, and the largest score with the sum of the shares.
struct Parts {
  float* values;     // (B, K, chunks, rows, padded head size)
  float* softmaxes;  // (B, K, chunks, rows, 2)
};

// One key/value head of one sequence.
struct Head {
  int size, half, stride;           // stride is the size in whole vectors
  int capacity, window, past, end;  // positions; the new tokens are at [past, end)
  int group, rows, first_chunk, end_chunk, chunks;
  int64_t index;  // among those of all sequences
  int64_t first_token, first_query, first_column;
};

__device__ inline Head HeadOf(const CachedAttentionArguments& given, const Piece& piece) {
  Head head = {};
  head.size = static_cast<int>(given.head_size);
  head.half = head.size / 2;
  head.stride = (head.size + kVector - 1) / kVector * kVector;
  head.capacity = static_cast<int>(given.capacity);
  head.window = static_cast<int>(Min(given.window, given.capacity));
  head.past = static_cast<int>(Max(0, Min(given.past_length[blockIdx.z] + piece.first, given.capacity)));
  head.end = head.past + static_cast<int>(piece.count);
  head.group = static_cast<int>(given.heads) / static_cast<int>(given.kv_heads);
  head.rows = static_cast<int>(piece.count) * head.group;
  const int first = given.window > 0 && head.past > head.window ? head.past - head.window : 0;
  head.first_chunk = first / kChunk;
  head.end_chunk = ((head.end < head.capacity ? head.end : head.capacity) + kChunk - 1) / kChunk;
  head.chunks = (head.capacity + kChunk - 1) / kChunk;
  head.index = static_cast<int64_t>(blockIdx.z) * given.kv_heads + blockIdx.y;
  head.first_token = blockIdx.z * given.tokens + piece.first;
  head.first_query = static_cast<int64_t>(blockIdx.y) * head.group;
  head.first_column = static_cast<int64_t>(blockIdx.y) * head.size;
  return head;
}

__device__ inline int TeamIndex() { return static_cast<int>(threadIdx.x) / kTeam; }
__device__ inline int FirstNumber() { return static_cast<int>(threadIdx.x) % kTeam * kVector; }
// The position whose score a lane has after SumOverTeam.
__device__ inline int OwnPosition(int start) {
  return start + static_cast<int>(threadIdx.x) % kKeys * kTeams + TeamIndex();
}

// Each of the sums, over the lanes that differ in `lanes` and lower bits: lane l gets sum l % kCount of them.
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

// The other way: lane l brings number l % kCount, and all lanes of a team get all.
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

// --- what is multiplied -----------------------------------------------------------------------------------------

// Rotary positions: the first half of a head is turned against the second.
struct Turned {
  float first, second;
};
__device__ inline Turned Rotate(const CachedAttentionArguments& given, const float* head, int64_t token, int i) {
  const int half = static_cast<int>(given.head_size) / 2;
  const float cosine = given.cosine[token * half + i], sine = given.sine[token * half + i];
  const float first = head[i], second = head[half + i];
  // Written out, so that no kernel's compiler takes the other product for the exact one.
  return {fmaf(first, cosine, -(second * sine)), fmaf(second, cosine, first * sine)};
}

// A team's rows of one cache as far as they are older than this call; zeros elsewhere, also behind the head.
template <class Stored>
__device__ inline void LoadOld(const Head& head, const Stored* cache, int start, Vector<Stored> (&rows)[kKeys]) {
  const int at = FirstNumber(), first = start + TeamIndex();
  const Stored* const from = cache + static_cast<int64_t>(first) * head.size + at;
  const bool is_aligned = head.size % kVector == 0 && reinterpret_cast<uintptr_t>(cache) % sizeof(Vector<Stored>) == 0;
#pragma unroll
  for (int k = 0; k < kKeys; ++k) {
    rows[k] = {};
    if (at >= head.size || first + k * kTeams >= head.past) continue;
    const Stored* const row = from + k * kTeams * head.size;
    if (is_aligned) {
      rows[k] = *reinterpret_cast<const Vector<Stored>*>(row);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      constexpr int kPerWord = 4 / sizeof(Stored);
      if (at + i < head.size) rows[k].words[i / kPerWord] |= BitsOf(row[i]) << (i % kPerWord * 8 * sizeof(Stored));
    }
  }
}

// The new tokens in a chunk.
struct NewTokens {
  int begin, end;  // positions
};
__device__ inline NewTokens NewTokensIn(const Head& head, int start) {
  const int end = head.end < head.capacity ? head.end : head.capacity;
  return {start > head.past ? start : head.past, start + kChunk < end ? start + kChunk : end};
}

// The new tokens of a chunk, into the caches and to the other threads.
template <class Number, int kMost>
__device__ inline void Append(const CachedAttentionArguments& given, const Head& head, Number* keys, Number* values,
                              const NewTokens& tokens, NewRows<Number, kMost>& fresh) {
  const int at = static_cast<int>(threadIdx.x) % kPairs, half = head.half;
  for (int position = tokens.begin + static_cast<int>(threadIdx.x) / kPairs; position < tokens.end;
       position += kThreads / kPairs) {
    const int row = position - tokens.begin;
    if (at >= half) {  // of what is behind the head
      fresh.keys[row][2 * at] = fresh.keys[row][2 * at + 1] = Number{};
      fresh.values[row][2 * at] = fresh.values[row][2 * at + 1] = Number{};
      continue;
    }
    const int64_t token = head.first_token + position - head.past, to = static_cast<int64_t>(position) * head.size + at;
    const float* const value = given.value + token * given.value_stride + head.first_column;
    const float first = value[at], second = value[half + at];
    const Turned key = Rotate(given, given.key + token * given.key_stride + head.first_column, token, at);
    fresh.keys[row][at] = keys[to] = Round(key.first, Number());
    fresh.keys[row][half + at] = keys[to + half] = Round(key.second, Number());
    fresh.values[row][at] = values[to] = Round(first, Number());
    fresh.values[row][half + at] = values[to + half] = Round(second, Number());
  }
}

// A row to bytes in [-127, 127], by a warp. load(i) gives its i-th number; what is not finite makes the scale so.
template <class Load>
__device__ inline void RoundRow(int size, const Load& load, int8_t* stored, int8_t (&row)[kSize], float* stored_scale,
                                float* scale) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  float numbers[kSize / kWarpSize], largest = 0.0f, poison = 0.0f;
#pragma unroll
  for (int k = 0; k < kSize / kWarpSize; ++k) {
    const int i = lane + k * kWarpSize;
    numbers[k] = i < size ? load(i) : 0.0f;
    largest = fmaxf(largest, fabsf(numbers[k]));
    poison += numbers[k] * 0.0f;
  }
  largest = WarpMax(largest);
  poison = WarpSum(poison);
  const float steps = 127.0f / fmaxf(largest, 1e-30f);
#pragma unroll
  for (int k = 0; k < kSize / kWarpSize; ++k) {
    const int i = lane + k * kWarpSize;
    const auto whole = static_cast<int8_t>(fminf(fmaxf(rintf(numbers[k] * steps), -127.0f), 127.0f));
    row[i] = whole;
    if (i < size) stored[i] = whole;
  }
  if (lane == 0) *scale = *stored_scale = largest / 127.0f + poison;
}

template <int kMost>
__device__ inline void Append(const CachedAttentionArguments& given, const Head& head, int8_t* keys, int8_t* values,
                              const NewTokens& tokens, NewRows<int8_t, kMost>& fresh) {
  // Every other warp has keys, the others values.
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, half = head.half;
  for (int position = tokens.begin + warp / 2; position < tokens.end; position += kWarps / 2) {
    const int row = position - tokens.begin;
    const int64_t token = head.first_token + position - head.past, to = static_cast<int64_t>(position) * head.size;
    const int64_t scale = head.index * head.capacity + position;
    if (warp % 2 == 0) {
      const float* const key = given.key + token * given.key_stride + head.first_column;
      const auto turned = [&](int i) {
        const Turned pair = Rotate(given, key, token, i < half ? i : i - half);
        return i < half ? pair.first : pair.second;
      };
      RoundRow(head.size, turned, keys + to, fresh.keys[row], given.key_scales + scale, fresh.key_scales + row);
    } else {
      const float* const value = given.value + token * given.value_stride + head.first_column;
      RoundRow(
          head.size, [&](int i) { return value[i]; }, values + to, fresh.values[row], given.value_scales + scale,
          fresh.value_scales + row);
    }
  }
}

// A thread's numbers of a chunk.
template <class Stored>
struct Chunk {
  Vector<Stored> keys[kKeys], values[kKeys];
  float key_scale, value_scale;  // of its own position, OwnPosition(start); 1 but for bytes
};

template <class Stored, int kMost>
__device__ inline void TakeNew(const NewTokens& tokens, int start, const NewRows<Stored, kMost>& fresh,
                               Chunk<Stored>& chunk) {
#pragma unroll
  for (int k = 0; k < kKeys; ++k) {
    const int position = start + k * kTeams + TeamIndex(), row = position - tokens.begin;
    if (row < 0 || position >= tokens.end) continue;
    chunk.keys[k] = *reinterpret_cast<const Vector<Stored>*>(&fresh.keys[row][FirstNumber()]);
    chunk.values[k] = *reinterpret_cast<const Vector<Stored>*>(&fresh.values[row][FirstNumber()]);
  }
  if constexpr (sizeof(Stored) == 1) {
    const int position = OwnPosition(start), row = position - tokens.begin;
    if (row < 0 || position >= tokens.end) return;
    chunk.key_scale = fresh.key_scales[row];
    chunk.value_scale = fresh.value_scales[row];
  }
}

// --- softmax ----------------------------------------------------------------------------------------------------

// What is subtracted before the exponential; where nothing is seen, or nothing but NaN, all stays as it is.
__device__ inline float Shift(float largest) { return largest == kNone ? 0.0f : largest; }

// What a warp found for a row, to the others: `values` is a team's, `sum` the warp's.
template <class Memory>
__device__ inline void Give(Memory& memory, int row, float largest, float sum, const float (&values)[kVector]) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  // The two teams of a warp add up, each half of the numbers.
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

// All warps' together: a number of a row.
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

// Rows [begin, begin + kRows) with a chunk.
template <class Stored, int kRows>
__device__ inline void Attend(const Head& head, const Chunk<Stored>& chunk, int start, int begin,
                              Memory<Stored, kRows>& memory) {
  constexpr bool kHasScales = sizeof(Stored) == 1;
  float queries[kRows][kVector], scores[kRows][kKeys], numbers[kVector];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) queries[row][i] = memory.query[row][FirstNumber() + i];
  }
#pragma unroll
  for (int k = 0; k < kKeys; ++k) {
    Widen(chunk.keys[k], numbers);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      scores[row][k] = 0.0f;
#pragma unroll
      for (int i = 0; i < kVector; ++i) scores[row][k] += numbers[i] * queries[row][i];
    }
  }
  const int position = OwnPosition(start);
  float shares[kRows][kKeys], largest[kRows], sums[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    float score = SumOverTeam(scores[row]);
    if constexpr (kHasScales) score *= chunk.key_scale;
    const int distance = head.past + (begin + row) / head.group - position;
    const bool is_seen = distance >= 0 && (head.window == 0 || distance <= head.window) && position < head.capacity;
    if (!is_seen) score = kNone;
    largest[row] = WarpMax(score);
    const float share = expf(score - Shift(largest[row]));
    sums[row] = WarpSum(share) * (static_cast<float>(kKeys) / kTeam);  // so many lanes of a team have the same
    GiveToTeam(kHasScales ? share * chunk.value_scale : share, shares[row]);
  }
  float values[kRows][kVector] = {};
#pragma unroll
  for (int k = 0; k < kKeys; ++k) {
    Widen(chunk.values[k], numbers);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[row][i] += shares[row][k] * numbers[i];
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) Give(memory, row, largest[row], sums[row], values[row]);
}

// Rows [begin, begin + kRows) of all chunks, each team its share of the chunks.
template <class Stored, int kRows>
__device__ inline void Gather(const Head& head, const Parts& parts, int begin, Memory<Stored, kRows>& memory) {
  constexpr int kSteps = kPartsAtOnce / kRows;
  const int at = FirstNumber(), lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t first = head.index * head.chunks * head.rows + begin;
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
  // A team's chunks are the same whichever is the first.
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

template <Storage storage, int kRows>
__global__ void __launch_bounds__(kThreads, kRows == 1 ? 4 : 3)
    CachedAttentionKernel(CachedAttentionArguments given, Piece piece, int* counters, Parts parts) {
  using Stored = typename StoredAs<storage>::Type;
  auto& memory = Shared<Memory<Stored, kRows>>();
  WaitForPrevious();
  AllowNext();
  const Head head = HeadOf(given, piece);
  const int first = head.first_chunk + static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  if (first >= head.end_chunk) return;
  Stored* const keys = static_cast<Stored*>(given.keys) + head.index * head.capacity * head.size;
  Stored* const values = static_cast<Stored*>(given.values) + head.index * head.capacity * head.size;
  const float scale = 1.0f / sqrtf(static_cast<float>(head.size));
  const int pair = static_cast<int>(threadIdx.x) % kPairs, number = static_cast<int>(threadIdx.x) % kSize;

  for (int c = first; c < head.end_chunk; c += blocks) {
    const int start = c * kChunk;
    const NewTokens tokens = NewTokensIn(head, start);
    Chunk<Stored> chunk;
    LoadOld(head, keys, start, chunk.keys);
    LoadOld(head, values, start, chunk.values);
    chunk.key_scale = chunk.value_scale = 1.0f;
    if constexpr (storage == Storage::kInt8) {
      if (const int position = OwnPosition(start); position < head.past) {
        chunk.key_scale = given.key_scales[head.index * head.capacity + position];
        chunk.value_scale = given.value_scales[head.index * head.capacity + position];
      }
    }
    for (int begin = 0; begin < head.rows; begin += kRows) {
      // Fetched before the new tokens are stored, for which no load waits.
      constexpr int kLoads = (kRows * kPairs + kThreads - 1) / kThreads;
      Turned turned[kLoads] = {};
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int row = begin + i * (kThreads / kPairs) + static_cast<int>(threadIdx.x) / kPairs;
        if (pair >= head.half || row >= head.rows || row >= begin + kRows) continue;
        const int64_t token = head.first_token + row / head.group, query = head.first_query + row % head.group;
        turned[i] = Rotate(given, given.query + token * given.query_stride + query * head.size, token, pair);
      }
      if (begin == 0) Append(given, head, keys, values, tokens, memory.fresh);
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int row = i * (kThreads / kPairs) + static_cast<int>(threadIdx.x) / kPairs;
        if (row >= kRows) continue;
        const bool is_inside = pair < head.half;  // zeros behind the head
        memory.query[row][is_inside ? pair : 2 * pair] = turned[i].first * scale;
        memory.query[row][is_inside ? head.half + pair : 2 * pair + 1] = turned[i].second * scale;
      }
      SyncThreads();
      if (begin == 0) TakeNew(tokens, start, memory.fresh, chunk);
      Attend(head, chunk, start, begin, memory);
      SyncThreads();
      // The next queries may come meanwhile: these were read before the barrier.
      for (int row = static_cast<int>(threadIdx.x) / kSize; row < kRows && begin + row < head.rows;
           row += kThreads / kSize) {
        const int64_t part = (head.index * head.chunks + c) * head.rows + begin + row;
        const Found found = Join(memory, row, number);
        if (number < head.stride) parts.values[part * head.stride + number] = found.value;
        if (number < 2) parts.softmaxes[2 * part + number] = number == 0 ? found.largest : found.sum;
      }
    }
  }

  const int chunks = head.end_chunk - head.first_chunk;
  if (!IsLastToArrive(counters + head.index, chunks < blocks ? chunks : blocks, &memory.arrived)) return;
  for (int begin = 0; begin < head.rows; begin += kRows) {
    Gather(head, parts, begin, memory);
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
    if (begin + kRows < head.rows) SyncThreads();  // before others' values come
  }
}

// --- the call ---------------------------------------------------------------------------------------------------

int64_t CounterBytes(const CachedAttentionArguments& given) {
  return CeilDivide(given.batch * given.kv_heads * 4, 16) * 16;
}

// The parts of as many tokens.
struct PartSizes {
  int64_t count, values;
};
PartSizes PartSizesOf(const CachedAttentionArguments& given, int64_t tokens) {
  const int64_t count = CeilDivide(given.capacity, kChunk) * given.batch * tokens * given.heads;
  return {count, count * CeilDivide(given.head_size, kVector) * kVector};
}

Status Check(const CachedAttentionArguments& given) {
  if (given.batch < 1 || given.tokens < 1) return "[cached_attention] there must be tokens, of one sequence or more";
  if (given.kv_heads < 1 || given.heads < 1 || given.heads % given.kv_heads != 0) {
    return "[cached_attention] heads must be a multiple of kv_heads";
  }
  if (given.head_size < 2 || given.head_size % 2 != 0 || given.head_size > kMostHeadSize) {
    return "[cached_attention] the head size must be even and at most 128";
  }
  if (given.capacity < 1 || given.window < 0)
    return "[cached_attention] capacity must be positive, window not negative";
  if (given.cache != Storage::kFloat16 && given.cache != Storage::kBFloat16 && given.cache != Storage::kInt8) {
    return "[cached_attention] caches must be float16, bfloat16 or int8";
  }
  if ((given.cache == Storage::kInt8) != (given.key_scales != nullptr && given.value_scales != nullptr)) {
    return "[cached_attention] int8 caches, and no others, must come with scales";
  }
  if (given.workspace == nullptr || given.workspace_bytes < CachedAttentionWorkspaceBytes(given)) {
    return "[cached_attention] the workspace is too small";
  }
  return nullptr;
}

template <int kRows>
auto KernelOf(Storage cache) {
  return cache == Storage::kFloat16    ? CachedAttentionKernel<Storage::kFloat16, kRows>
         : cache == Storage::kBFloat16 ? CachedAttentionKernel<Storage::kBFloat16, kRows>
                                       : CachedAttentionKernel<Storage::kInt8, kRows>;
}

}  // namespace

int64_t CachedAttentionWorkspaceBytes(const CachedAttentionArguments& given) {
  const PartSizes sizes = PartSizesOf(given, std::min(given.tokens, kMostDecodeTokens));
  return CounterBytes(given) + (sizes.values + 2 * sizes.count) * 4;
}

Status CachedAttention(const CachedAttentionArguments& given, Stream stream) {
  if (const Status wrong = Check(given)) return wrong;
  const int64_t heads = given.batch * given.kv_heads;
  const int64_t blocks = std::min(CeilDivide(given.capacity, kChunk), CeilDivide(kTargetBlocks, heads));
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(given.kv_heads),
                  static_cast<unsigned>(given.batch));
  int* const counters = static_cast<int*>(given.workspace);
  float* const values = static_cast<float*>(given.workspace) + CounterBytes(given) / 4;
  for (int64_t first = 0; first < given.tokens; first += kMostDecodeTokens) {
    const Piece piece = {first, std::min(given.tokens - first, kMostDecodeTokens)};
    const Parts parts = {values, values + PartSizesOf(given, piece.count).values};
    const auto kernel =
        piece.count * given.heads == given.kv_heads ? KernelOf<1>(given.cache) : KernelOf<4>(given.cache);
    const Status wrong = Launch(kernel, grid, dim3(kThreads), stream, given, piece, counters, parts);
    if (wrong != nullptr) return wrong;
  }
  return nullptr;
}

}  // namespace healthgpt::cuda
