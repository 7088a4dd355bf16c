// Attention of a decode step, the context split over blocks (Dao et al., "Flash-Decoding", 2023).
//
// Block c of a key/value head takes positions 64 c to 64 c + 63: it fetches their keys and values at once, appends
// those of the new tokens that fall there, and gives each row (a query head at a token) the maximum, the sum and the
// values of its softmax over them. The last block of a head puts the parts together in order. Chunks lie at fixed
// positions, so that a row's sums are made alike in every call.
//
// Cached bytes become float16, which holds them exactly; what a step of them is worth multiplies scores and shares.
#include <algorithm>

#include "cached_attention/cuda.h"
#include "cuda/launch.cuh"
#include "cuda/numbers.cuh"

namespace healthgpt::cuda {
namespace {

constexpr int kChunk = 64;                     // positions
constexpr int kThreads = 128;                  // two per position
constexpr int kRowsAtOnce = 8;                 // in shared memory
constexpr int kVector = 8;                     // numbers of 16 bytes
constexpr int kRow = kMostHeadSize + kVector;  // of cached numbers in shared memory: no two rows of 8 begin in one bank
constexpr float kNone = -INFINITY;

// What the caches hold, and what that is in shared memory.
template <Storage storage>
struct Cached {
  using Stored = Half;
  using Number = Half;
};
template <>
struct Cached<Storage::kBFloat16> {
  using Stored = BFloat16;
  using Number = BFloat16;
};
template <>
struct Cached<Storage::kInt8> {
  using Stored = int8_t;
  using Number = Half;
};

template <class Number>
struct Memory {
  alignas(16) Number keys[kChunk][kRow];
  alignas(16) Number values[kChunk][kRow];
  float key_scales[kChunk], value_scales[kChunk];  // of bytes alone
  alignas(16) float query[kRowsAtOnce][kMostHeadSize];
  float shares[kRowsAtOnce][kChunk];
  int arrived;
};

// The tokens of one launch among those of the call.
struct Piece {
  int64_t first, count;
};

// One key/value head of one sequence.
struct Head {
  int64_t index;  // among those of all sequences
  int64_t head, group, tokens, rows, past, first_token, first_chunk, end_chunk;
};

__device__ inline Head HeadOf(const CachedAttentionArguments& given, const Piece& piece) {
  Head head = {};
  head.head = blockIdx.y;
  head.index = blockIdx.z * given.kv_heads + head.head;
  head.group = given.heads / given.kv_heads;
  head.tokens = piece.count;
  head.rows = piece.count * head.group;
  head.past = given.past_length[blockIdx.z] + piece.first;
  head.first_token = blockIdx.z * given.tokens + piece.first;
  const int64_t first = given.window > 0 ? Max(0, head.past - given.window) : 0;
  head.first_chunk = first / kChunk;
  head.end_chunk = Min(head.past + piece.count + kChunk - 1, given.capacity + kChunk - 1) / kChunk;
  return head;
}

// Rotary positions: the first half of a head is turned against the second.
struct Turned {
  float first, second;
};
__device__ inline Turned Rotate(const CachedAttentionArguments& given, const float* head, int64_t token, int64_t i) {
  const int64_t half = given.head_size / 2;
  const float cosine = given.cosine[token * half + i], sine = given.sine[token * half + i];
  const float first = head[i], second = head[half + i];
  return {first * cosine - second * sine, second * cosine + first * sine};
}

// Eight cached numbers as they are multiplied.
template <class Number>
__device__ inline uint4 Widen(const Number* numbers) {
  return {Pack(numbers[0], numbers[1]), Pack(numbers[2], numbers[3]), Pack(numbers[4], numbers[5]),
          Pack(numbers[6], numbers[7])};
}
__device__ inline uint4 Widen(const int8_t* numbers) {
  Half halves[kVector];
  for (int i = 0; i < kVector; ++i) halves[i] = Round(static_cast<float>(numbers[i]), Half());
  return Widen(halves);
}

// As many bytes as eight of them take, read at once.
template <class Stored>
struct alignas(kVector * sizeof(Stored)) Vector {
  Stored numbers[kVector];
};

// The chunk's rows of one cache as far as they are older than this call; zeros elsewhere, also behind the head.
template <class Stored, class Number>
__device__ inline void LoadChunk(const CachedAttentionArguments& given, const Head& head, const Stored* cache,
                                 int64_t start, Number (&rows)[kChunk][kRow]) {
  const int64_t size = given.head_size, vectors = (size + kVector - 1) / kVector;
  const bool is_aligned = size % kVector == 0 && reinterpret_cast<uintptr_t>(cache) % sizeof(Vector<Stored>) == 0;
  for (int64_t i = threadIdx.x; i < kChunk * vectors; i += kThreads) {
    const int64_t row = i / vectors, at = i % vectors * kVector, position = start + row;
    Vector<Stored> vector = {};
    if (position < head.past && position < given.capacity) {
      const Stored* from = cache + position * size + at;
      if (is_aligned) {
        vector = *reinterpret_cast<const Vector<Stored>*>(from);
      } else {
        for (int j = 0; j < kVector; ++j) {
          if (at + j < size) vector.numbers[j] = from[j];
        }
      }
    }
    *reinterpret_cast<uint4*>(&rows[row][at]) = Widen(vector.numbers);
  }
}

__device__ inline void LoadScales(const CachedAttentionArguments& given, const Head& head, const float* scales,
                                  int64_t start, float (&of_rows)[kChunk]) {
  for (int64_t row = threadIdx.x; row < kChunk; row += kThreads) {
    const bool is_old = start + row < head.past && start + row < given.capacity;
    of_rows[row] = is_old ? scales[head.index * given.capacity + start + row] : 0.0f;
  }
}

// The new tokens that fall into the chunk, into the caches and to the others.
template <class Number>
__device__ inline void Append(const CachedAttentionArguments& given, const Head& head, Number* keys, Number* values,
                              int64_t start, Memory<Number>& memory) {
  const int64_t size = given.head_size, half = size / 2;
  const int64_t begin = Max(start, head.past), end = Min(Min(start + kChunk, head.past + head.tokens), given.capacity);
  for (int64_t i = threadIdx.x; i < (end - begin) * half; i += kThreads) {
    const int64_t position = begin + i / half, at = i % half;
    const int64_t token = head.first_token + position - head.past;
    const float* value = given.value + token * given.value_stride + head.head * size;
    const Turned key = Rotate(given, given.key + token * given.key_stride + head.head * size, token, at);
    const Number rounded[4] = {Round(key.first, Number()), Round(key.second, Number()), Round(value[at], Number()),
                               Round(value[half + at], Number())};
    const int64_t row = position - start, to = position * size + at;
    memory.keys[row][at] = keys[to] = rounded[0];
    memory.keys[row][half + at] = keys[to + half] = rounded[1];
    memory.values[row][at] = values[to] = rounded[2];
    memory.values[row][half + at] = values[to + half] = rounded[3];
  }
}

// A row to bytes in [-127, 127], by a warp. load(i) gives its i-th number; what is not finite makes the scale so.
template <class Load>
__device__ inline void RoundRow(int64_t size, const Load& load, int8_t* stored, Half* row, float* stored_scale,
                                float* scale) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  float largest = 0.0f, poison = 0.0f;
  for (int64_t i = lane; i < size; i += kWarpSize) {
    const float value = load(i);
    largest = fmaxf(largest, fabsf(value));
    poison += value * 0.0f;
  }
  largest = WarpMax(largest);
  poison = WarpSum(poison);
  const float steps = 127.0f / fmaxf(largest, 1e-30f);
  for (int64_t i = lane; i < size; i += kWarpSize) {
    const float whole = fminf(fmaxf(rintf(load(i) * steps), -127.0f), 127.0f);
    stored[i] = static_cast<int8_t>(whole);
    row[i] = Round(whole, Half());
  }
  if (lane == 0) *scale = *stored_scale = largest / 127.0f + poison;
}

__device__ inline void Append(const CachedAttentionArguments& given, const Head& head, int8_t* keys, int8_t* values,
                              int64_t start, Memory<Half>& memory) {
  const int64_t size = given.head_size, half = size / 2;
  const int64_t begin = Max(start, head.past), end = Min(Min(start + kChunk, head.past + head.tokens), given.capacity);
  for (int64_t position = begin + threadIdx.x / kWarpSize; position < end; position += kThreads / kWarpSize) {
    const int64_t token = head.first_token + position - head.past, row = position - start;
    const int64_t of_scale = head.index * given.capacity + position;
    const float* key = given.key + token * given.key_stride + head.head * size;
    const float* value = given.value + token * given.value_stride + head.head * size;
    const auto turned = [&](int64_t i) {
      const Turned pair = Rotate(given, key, token, i % half);
      return i < half ? pair.first : pair.second;
    };
    RoundRow(size, turned, keys + position * size, memory.keys[row], given.key_scales + of_scale,
             memory.key_scales + row);
    RoundRow(
        size, [&](int64_t i) { return value[i]; }, values + position * size, memory.values[row],
        given.value_scales + of_scale, memory.value_scales + row);
  }
}

// Scores of rows [begin, begin + count) with the chunk's keys.
template <bool has_scales, class Number>
__device__ inline void Score(const CachedAttentionArguments& given, const Head& head, int64_t start, int64_t begin,
                             int count, Memory<Number>& memory) {
  constexpr int kParts = kThreads / kChunk, kRows = kRowsAtOnce / kParts;
  const int key = static_cast<int>(threadIdx.x) % kChunk, part = static_cast<int>(threadIdx.x) / kChunk;
  float sums[kRows] = {};
  for (int at = 0; at < given.head_size; at += kVector) {
    const uint4 word = *reinterpret_cast<const uint4*>(&memory.keys[key][at]);
    const uint32_t words[4] = {word.x, word.y, word.z, word.w};
    for (int j = 0; j < kVector; ++j) {
      const float number = ToFloat(Number{static_cast<uint16_t>(words[j / 2] >> (j % 2 * 16))});
      for (int i = 0; i < kRows; ++i) {
        if (part + kParts * i < count) sums[i] += number * memory.query[part + kParts * i][at + j];
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    const int row = part + kParts * i;
    if (row >= count) continue;
    const int64_t distance = head.past + (begin + row) / head.group - (start + key);
    const bool is_seen =
        distance >= 0 && (given.window == 0 || distance <= given.window) && start + key < given.capacity;
    if constexpr (has_scales) sums[i] *= memory.key_scales[key];
    memory.shares[row][key] = is_seen ? sums[i] : kNone;
  }
}

// What is subtracted before the exponential; where nothing is seen, or nothing but NaN, all stays as it is.
__device__ inline float Shift(float largest) { return largest == kNone ? 0.0f : largest; }

// A part: its largest score, the sum of its shares, and its values.
__device__ inline float* PartOf(const CachedAttentionArguments& given, const Head& head, float* parts, int64_t chunk,
                                int64_t row) {
  const int64_t chunks = (given.capacity + kChunk - 1) / kChunk;
  const int64_t index = (head.index * chunks + chunk) * head.rows + row;
  return parts + index * (given.head_size + 2);
}

template <Storage storage>
__global__ void __launch_bounds__(kThreads, 1)
    CachedAttentionKernel(CachedAttentionArguments given, Piece piece, int* counters, float* parts) {
  using Stored = typename Cached<storage>::Stored;
  constexpr bool kHasScales = storage == Storage::kInt8;
  auto& memory = Shared<Memory<typename Cached<storage>::Number>>();
  WaitForPrevious();
  AllowNext();
  const Head head = HeadOf(given, piece);
  const int64_t chunk = blockIdx.x, start = chunk * kChunk, size = given.head_size, half = size / 2;
  if (chunk < head.first_chunk || chunk >= head.end_chunk) return;
  Stored* const keys = static_cast<Stored*>(given.keys) + head.index * given.capacity * size;
  Stored* const values = static_cast<Stored*>(given.values) + head.index * given.capacity * size;
  LoadChunk(given, head, keys, start, memory.keys);
  LoadChunk(given, head, values, start, memory.values);
  if constexpr (kHasScales) {
    LoadScales(given, head, given.key_scales, start, memory.key_scales);
    LoadScales(given, head, given.value_scales, start, memory.value_scales);
  }
  SyncThreads();  // a new token's row was filled with zeros
  Append(given, head, keys, values, start, memory);

  const float scale = 1.0f / sqrtf(static_cast<float>(size));
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  for (int64_t begin = 0; begin < head.rows; begin += kRowsAtOnce) {
    const int count = static_cast<int>(Min(kRowsAtOnce, head.rows - begin));
    for (int64_t i = threadIdx.x; i < count * half; i += kThreads) {
      const int64_t row = i / half, at = i % half;
      const int64_t token = head.first_token + (begin + row) / head.group;
      const int64_t query_head = head.head * head.group + (begin + row) % head.group;
      const Turned turned = Rotate(given, given.query + token * given.query_stride + query_head * size, token, at);
      memory.query[row][at] = turned.first * scale;
      memory.query[row][half + at] = turned.second * scale;
    }
    // The last vector of a head may reach beyond it.
    for (int64_t i = threadIdx.x; i < count * kVector; i += kThreads) {
      if (size + i % kVector < kMostHeadSize) memory.query[i / kVector][size + i % kVector] = 0.0f;
    }
    SyncThreads();
    Score<kHasScales>(given, head, start, begin, count, memory);
    SyncThreads();
    for (int row = warp; row < count; row += kThreads / kWarpSize) {
      float* const shares = memory.shares[row];
      const float largest = WarpMax(fmaxf(shares[lane], shares[kWarpSize + lane]));
      const float low = expf(shares[lane] - Shift(largest)), high = expf(shares[kWarpSize + lane] - Shift(largest));
      const float sum = WarpSum(low + high);
      shares[lane] = kHasScales ? low * memory.value_scales[lane] : low;
      shares[kWarpSize + lane] = kHasScales ? high * memory.value_scales[kWarpSize + lane] : high;
      if (lane == 0) {
        float* const part = PartOf(given, head, parts, chunk, begin + row);
        part[0] = largest;
        part[1] = sum;
      }
    }
    SyncThreads();
    for (int64_t i = threadIdx.x; i < count * half; i += kThreads) {
      const int64_t row = i / half, at = i % half * 2;
      float first = 0.0f, second = 0.0f;
#pragma unroll 8
      for (int key = 0; key < kChunk; ++key) {
        const float share = memory.shares[row][key];
        first += share * ToFloat(memory.values[key][at]);
        second += share * ToFloat(memory.values[key][at + 1]);
      }
      float* const part = PartOf(given, head, parts, chunk, begin + row);
      part[2 + at] = first;
      part[2 + at + 1] = second;
    }
    // The next rows' queries may come: these were last read before the shares were made.
  }

  const auto chunks = static_cast<int>(head.end_chunk - head.first_chunk);
  if (!IsLastBlock(counters + head.index, chunks, &memory.arrived, threadIdx.x == 0)) return;
  for (int64_t i = threadIdx.x; i < head.rows * size; i += kThreads) {
    const int64_t row = i / size, at = i % size;
    float largest = kNone;
    for (int64_t c = head.first_chunk; c < head.end_chunk; ++c) {
      largest = fmaxf(largest, LoadFresh(PartOf(given, head, parts, c, row)));
    }
    float total = 0.0f, sum = 0.0f;
    for (int64_t c = head.first_chunk; c < head.end_chunk; ++c) {
      const float* const part = PartOf(given, head, parts, c, row);
      const float share = expf(LoadFresh(part) - Shift(largest));
      total += share * LoadFresh(part + 1);
      sum += share * LoadFresh(part + 2 + at);
    }
    const int64_t token = head.first_token + row / head.group;
    const int64_t query_head = head.head * head.group + row % head.group;
    given.output[(token * given.heads + query_head) * size + at] = sum / total;
  }
}

int64_t CounterBytes(const CachedAttentionArguments& given) {
  return CeilDivide(given.batch * given.kv_heads * 4, 16) * 16;
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

}  // namespace

int64_t CachedAttentionWorkspaceBytes(const CachedAttentionArguments& given) {
  const int64_t rows = given.batch * std::min(given.tokens, kMostDecodeTokens) * given.heads;
  return CounterBytes(given) + CeilDivide(given.capacity, kChunk) * rows * (given.head_size + 2) * 4;
}

Status CachedAttention(const CachedAttentionArguments& given, Stream stream) {
  if (const Status wrong = Check(given)) return wrong;
  const dim3 grid(static_cast<unsigned>(CeilDivide(given.capacity, kChunk)), static_cast<unsigned>(given.kv_heads),
                  static_cast<unsigned>(given.batch));
  int* const counters = static_cast<int*>(given.workspace);
  float* const parts = static_cast<float*>(given.workspace) + CounterBytes(given) / 4;
  const auto kernel = given.cache == Storage::kFloat16    ? CachedAttentionKernel<Storage::kFloat16>
                      : given.cache == Storage::kBFloat16 ? CachedAttentionKernel<Storage::kBFloat16>
                                                          : CachedAttentionKernel<Storage::kInt8>;
  for (int64_t first = 0; first < given.tokens; first += kMostDecodeTokens) {
    const Piece piece = {first, std::min(given.tokens - first, kMostDecodeTokens)};
    const Status wrong = Launch(kernel, grid, dim3(kThreads), stream, given, piece, counters, parts);
    if (wrong != nullptr) return wrong;
  }
  return nullptr;
}

}  // namespace healthgpt::cuda
