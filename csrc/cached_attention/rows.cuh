// How kernels read and write the caches: decode.cu's chunks go to registers, new tokens' rows to the caches.
//
// A team of 16 threads holds the numbers of one position, 8 per thread, for 8 positions of a chunk.
#pragma once

#include "cached_attention/cuda.h"
#include "cuda/numbers.cuh"

namespace healthgpt::cuda {
namespace {

constexpr int kVector = 8;  // numbers of a position per thread
constexpr int kSize = static_cast<int>(kMostHeadSize);
constexpr int kPairs = kSize / 2;
constexpr int kTeam = kSize / kVector;  // threads
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTeams = kThreads / kTeam;
constexpr int kKeys = 8;                // positions of a chunk per thread
constexpr int kChunk = kTeams * kKeys;  // positions

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

// A thread's numbers of one position, loaded at once.
template <class Stored>
struct alignas(kVector * sizeof(Stored)) Vector {
  uint32_t words[kVector * sizeof(Stored) / 4];
};

__device__ inline uint32_t BitsOf(Half number) { return number.bits; }
__device__ inline uint32_t BitsOf(BFloat16 number) { return number.bits; }
__device__ inline uint32_t BitsOf(int8_t number) { return static_cast<uint8_t>(number); }

template <class Stored>
__device__ inline float NumberOf(const Vector<Stored>& vector, int i) {
  return ToFloat(Stored{static_cast<uint16_t>(vector.words[i / 2] >> (i % 2 * 16))});
}
__device__ inline float NumberOf(const Vector<int8_t>& vector, int i) {
  return static_cast<float>(static_cast<int8_t>(vector.words[i / 4] >> (i % 4 * 8)));
}

// A thread's numbers of a chunk.
template <class Stored>
struct Chunk {
  Vector<Stored> keys[kKeys], values[kKeys];
  float key_scale, value_scale;  // only for int8: those of OwnPosition(start)
};

// The tokens of one launch, and values that are the same for all its blocks.
struct Piece {
  int64_t first;              // token of the call
  int tokens, group, chunks;  // group: query heads per key/value head; chunks: of the whole capacity
  float scale;                // of scores
};

// One key/value head of one sequence.
struct Head {
  int size, half, stride;           // stride: the size rounded up to whole vectors
  int capacity, window, past, end;  // positions; the new tokens are at [past, end)
  int group, rows, first_chunk, end_chunk;
  int index;          // among the heads of all sequences
  int64_t first_row;  // of this head in the caches
  int64_t first_token, first_query, first_column;
};

// With kRows = 1 there is only a single row.
template <int kRows>
__device__ inline Head HeadOf(const CachedAttentionArguments& given, const Piece& piece) {
  Head head = {};
  head.size = static_cast<int>(given.head_size);
  head.half = head.size / 2;
  head.stride = (head.size + kVector - 1) / kVector * kVector;
  head.capacity = static_cast<int>(given.capacity);
  head.window = static_cast<int>(Min(given.window, given.capacity));
  head.past = static_cast<int>(Max(0, Min(given.past_length[blockIdx.z] + piece.first, given.capacity)));
  const int tokens = kRows == 1 ? 1 : piece.tokens;
  head.end = head.past + tokens;
  head.group = kRows == 1 ? 1 : piece.group;
  head.rows = tokens * head.group;
  const int first = head.window > 0 && head.past > head.window ? head.past - head.window : 0;
  head.first_chunk = first / kChunk;
  head.end_chunk = (Least(head.end, head.capacity) + kChunk - 1) / kChunk;
  head.index = static_cast<int>(blockIdx.z) * static_cast<int>(given.kv_heads) + static_cast<int>(blockIdx.y);
  head.first_row = static_cast<int64_t>(head.index) * head.capacity;
  head.first_token = blockIdx.z * given.tokens + piece.first;
  head.first_query = static_cast<int64_t>(blockIdx.y) * head.group;
  head.first_column = static_cast<int64_t>(blockIdx.y) * head.size;
  return head;
}

__device__ inline int TeamIndex() { return static_cast<int>(threadIdx.x) / kTeam; }
__device__ inline int FirstNumber() { return static_cast<int>(threadIdx.x) % kTeam * kVector; }
// The position of a chunk whose score and scales a thread holds.
__device__ inline int OwnPosition(int start) {
  return start + static_cast<int>(threadIdx.x) % kKeys * kTeams + TeamIndex();
}

// Rotary positions pair number i of a head's first half with number i of its second half. This holds a pair as loaded.
struct Pair {
  float first, second, cosine, sine;
  // With explicit fmaf, so that the compiler rounds the same product in every kernel.
  __device__ float turned_first() const { return fmaf(first, cosine, -(second * sine)); }
  __device__ float turned_second() const { return fmaf(second, cosine, first * sine); }
};
__device__ inline Pair LoadPair(const CachedAttentionArguments& given, const Head& head, const float* numbers,
                                int64_t token, int i) {
  const int64_t angle = token * head.half + i;
  return {numbers[i], numbers[head.half + i], given.cosine[angle], given.sine[angle]};
}

// Inserts a number at the front and drops the last one.
template <class Stored>
__device__ inline void Prepend(Vector<Stored>& vector, uint32_t number) {
  constexpr int kBits = 8 * sizeof(Stored);
#pragma unroll
  for (int i = kVector * kBits / 32 - 1; i > 0; --i) {
    vector.words[i] = vector.words[i] << kBits | vector.words[i - 1] >> (32 - kBits);
  }
  vector.words[0] = vector.words[0] << kBits | number;
}

// Loads the rows of a chunk that were cached before this call, with zeros elsewhere and past the head's end. All loads
// are issued before the first result is used.
template <class Stored>
__device__ inline void LoadOld(const Head& head, const Stored* keys, const Stored* values, int start,
                               Chunk<Stored>& chunk) {
  using Loaded = Vector<Stored>;
  const int at = FirstNumber(), first = start + TeamIndex(), step = kTeams * head.size;
  const int64_t from = static_cast<int64_t>(first) * head.size + at;
  const Stored *key = keys + from, *value = values + from;
  const bool is_aligned = head.size % kVector == 0 && reinterpret_cast<uintptr_t>(keys) % sizeof(Loaded) == 0 &&
                          reinterpret_cast<uintptr_t>(values) % sizeof(Loaded) == 0;
  const int end = at < head.size ? head.past : 0;
#pragma unroll
  for (int k = 0; k < kKeys; ++k) chunk.keys[k] = chunk.values[k] = {};
  if (is_aligned) {
#pragma unroll
    for (int k = 0; k < kKeys; ++k, key += step, value += step) {
      if (first + k * kTeams >= end) continue;
      chunk.keys[k] = *reinterpret_cast<const Loaded*>(key);
      chunk.values[k] = *reinterpret_cast<const Loaded*>(value);
    }
    return;
  }
#pragma unroll 1
  for (int i = kVector - 1; i >= 0; --i) {
    const bool is_inside = at + i < head.size;
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      const bool is_there = is_inside && first + k * kTeams < end;
      Prepend(chunk.keys[k], is_there ? BitsOf(key[k * step + i]) : 0);
      Prepend(chunk.values[k], is_there ? BitsOf(value[k * step + i]) : 0);
    }
  }
}

// The new tokens of a chunk as the caches store them, with zeros past the head's end.
template <class Stored, int kMost>
struct NewRows {
  alignas(16) Stored keys[kMost][kSize];
  alignas(16) Stored values[kMost][kSize];
  float key_scales[kMost], value_scales[kMost];  // only for int8
};

// The new tokens in a chunk.
struct NewTokens {
  int begin, end;  // positions
};
__device__ inline NewTokens NewTokensIn(const Head& head, int start) {
  return {start > head.past ? start : head.past, Least(start + kChunk, Least(head.end, head.capacity))};
}

// Writes the new tokens of a chunk to the caches and, for the other threads, to shared memory.
template <class Number, int kMost>
__device__ inline void Append(const CachedAttentionArguments& given, const Head& head, Number* keys, Number* values,
                              const NewTokens& tokens, NewRows<Number, kMost>& fresh) {
  const int at = static_cast<int>(threadIdx.x) % kPairs, half = head.half;
  for (int position = tokens.begin + static_cast<int>(threadIdx.x) / kPairs; position < tokens.end;
       position += kThreads / kPairs) {
    const int row = position - tokens.begin;
    if (at >= half) {  // past the head's end
      fresh.keys[row][2 * at] = fresh.keys[row][2 * at + 1] = Number{};
      fresh.values[row][2 * at] = fresh.values[row][2 * at + 1] = Number{};
      continue;
    }
    const int64_t token = head.first_token + position - head.past, to = static_cast<int64_t>(position) * head.size + at;
    const float* const value = given.value + token * given.value_stride + head.first_column;
    const float first = value[at], second = value[half + at];
    const Pair key = LoadPair(given, head, given.key + token * given.key_stride + head.first_column, token, at);
    fresh.keys[row][at] = keys[to] = Round(key.turned_first(), Number());
    fresh.keys[row][half + at] = keys[to + half] = Round(key.turned_second(), Number());
    fresh.values[row][at] = values[to] = Round(first, Number());
    fresh.values[row][half + at] = values[to + half] = Round(second, Number());
  }
}

// A warp quantises a row to [-127, 127]. load(i) gives its i-th number. If one is not finite, neither is the scale.
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
  // Even warps take keys, odd warps values.
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, half = head.half;
  for (int position = tokens.begin + warp / 2; position < tokens.end; position += kWarps / 2) {
    const int row = position - tokens.begin;
    const int64_t token = head.first_token + position - head.past, to = static_cast<int64_t>(position) * head.size;
    const int64_t scale = head.first_row + position;
    if (warp % 2 == 0) {
      const float* const key = given.key + token * given.key_stride + head.first_column;
      const auto turned = [&](int i) {
        const Pair pair = LoadPair(given, head, key, token, i < half ? i : i - half);
        return i < half ? pair.turned_first() : pair.turned_second();
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

// Puts the new tokens into the chunk's registers.
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

}  // namespace
}  // namespace healthgpt::cuda
