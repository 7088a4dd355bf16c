// Attention of a prompt by tensor cores (Dao, "FlashAttention-2", 2023), in two launches.
//
// The first appends the new tokens to the caches, by the code of decode.cu. The second attends: a block takes 64 tokens
// of one query head, 16 to a warp, and goes over the chunks of 64 positions that they see. A chunk's keys and values
// become float16 rows in shared memory. While they are multiplied, the next rows are on their way to registers.
//
// A lane's sums of scores are, once rounded, just what it must bring as the left operand of weights times values.
#include <cmath>

#include "cached_attention/prefill.h"
#include "cached_attention/rows.cuh"
#include "cached_attention/softmax.cuh"
#include "cuda/launch.cuh"
#include "cuda/tensor_cores.cuh"

namespace healthgpt::cuda {
namespace {

constexpr int kTile = 16;  // of a product: rows, and the numbers that are summed
constexpr int kTokens = kWarps * kTile;
constexpr int kAppended = 8;  // tokens that a block appends: few, because it takes them one after another
// A row's padding in shared memory. Rows are an odd multiple of 16 bytes apart, so that the 32 words that a warp loads
// at once are in different banks.
constexpr int kPadding = 8;
static_assert(kTokens == kChunk && kThreads == kChunk / 2 * 4);  // queries fit; four threads share two rows

// kWidth is the head size, rounded up. All rows end with zeros up to there.
template <int kWidth>
struct Rows {
  alignas(16) Half numbers[kChunk][kWidth + kPadding];
};

template <int kWidth>
struct PrefillMemory {
  Rows<kWidth> keys, values;  // in `values` first the queries
};

__device__ inline uint32_t WordAt(const Half* at) { return *reinterpret_cast<const uint32_t*>(at); }

// A thread's share of a chunk's keys or values, on its way to shared memory: every fourth vector of two rows.
template <class Stored, int kWidth>
struct Staged {
  static constexpr int kVectors = kWidth / kVector / 4;
  Vector<Stored> vectors[2][kVectors];
  float scales[2];  // only for int8
};
// The share's first row and number; the second row is kChunk / 2 further on. Rows r and r + 4 are at neighbouring
// threads, because in shared memory they share no bank.
struct Share {
  int row, number;
};
__device__ inline Share OwnShare() {
  const int thread = static_cast<int>(threadIdx.x);
  return {thread / kWarpSize * 8 + thread / 4 % 2 * 4 + thread / 8 % 4, thread % 4 * kVector};
}

// The positions that any of a block's tokens sees.
struct Seen {
  int begin, end;
};

// Loads the chunk's rows that are seen, with zeros elsewhere and past the head's end: what lies there may be NaN.
template <class Stored, int kWidth>
__device__ inline void Load(const Head& head, const Stored* rows, const float* scales, int start, const Seen& seen,
                            Staged<Stored, kWidth>& staged) {
  using Loaded = Vector<Stored>;
  constexpr int kVectors = Staged<Stored, kWidth>::kVectors;
  const Share own = OwnShare();
  const bool is_aligned = head.size % kVector == 0 && reinterpret_cast<uintptr_t>(rows) % sizeof(Loaded) == 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int position = start + own.row + i * (kChunk / 2);
    const int size = position >= seen.begin && position < seen.end ? head.size : 0;
    if constexpr (sizeof(Stored) == 1) staged.scales[i] = size > 0 ? scales[head.first_row + position] : 0.0f;
    const Stored* const row = rows + static_cast<int64_t>(position) * head.size;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) staged.vectors[i][k] = {};
    if (is_aligned) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        const int at = own.number + 4 * kVector * k;
        if (at < size) staged.vectors[i][k] = *reinterpret_cast<const Loaded*>(row + at);
      }
      continue;
    }
#pragma unroll 1
    for (int n = kVector - 1; n >= 0; --n) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        const int at = own.number + 4 * kVector * k + n;
        Prepend(staged.vectors[i][k], at < size ? BitsOf(row[at]) : 0);
      }
    }
  }
}

// A row's numbers as float16.
__device__ inline Vector<Half> Widened(const Vector<Half>& vector, float) { return vector; }
__device__ inline Vector<Half> Widened(const Vector<int8_t>& vector, float scale) {
  Vector<Half> halves;
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    halves.words[i] = RoundHalves(NumberOf(vector, 2 * i) * scale, NumberOf(vector, 2 * i + 1) * scale);
  }
  return halves;
}

template <class Stored, int kWidth>
__device__ inline void Store(const Staged<Stored, kWidth>& staged, Rows<kWidth>& rows) {
  const Share own = OwnShare();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    Half* const row = rows.numbers[own.row + i * (kChunk / 2)];
#pragma unroll
    for (int k = 0; k < Staged<Stored, kWidth>::kVectors; ++k) {
      *reinterpret_cast<Vector<Half>*>(row + own.number + 4 * kVector * k) =
          Widened(staged.vectors[i][k], staged.scales[i]);
    }
  }
}

// Puts the block's queries of one head into shared memory: rotated, multiplied by `scale`, with zeros past the head's
// end. Rows past the last token repeat it, because a condition in the loop would make each row's loads wait for the
// last row's.
template <int kWidth>
__device__ inline void RotateQueries(const CachedAttentionArguments& given, const Head& head, const Piece& piece,
                                     int64_t query_head, Rows<kWidth>& rows) {
  const int pair = static_cast<int>(threadIdx.x) % kPairs, first = static_cast<int>(threadIdx.x) / kPairs;
  constexpr int kTogether = kThreads / kPairs;  // rows
  if (pair < head.half) {
#pragma unroll 8
    for (int i = 0; i < kTokens / kTogether; ++i) {
      const int row = first + i * kTogether;
      const int64_t token = head.first_token + Least(row, piece.tokens - 1);
      const float* const numbers = given.query + token * given.query_stride + query_head * head.size;
      const Pair query = LoadPair(given, head, numbers, token, pair);
      rows.numbers[row][pair] = Round(query.turned_first() * piece.scale, Half());
      rows.numbers[row][head.half + pair] = Round(query.turned_second() * piece.scale, Half());
    }
  } else if (2 * pair < kWidth) {
    for (int i = 0; i < kTokens / kTogether; ++i) {
      const int row = first + i * kTogether;
      rows.numbers[row][2 * pair] = rows.numbers[row][2 * pair + 1] = Half{};
    }
  }
}

// A warp's 16 tokens. Each lane has numbers of two of them, g and g + 8 (tensor_cores.cuh).
template <int kWidth>
struct Tokens {
  Left queries[kWidth / kTile];
  int first;     // position of the warp's first token
  int farthest;  // how far behind a token the positions that it sees may be
  float largest[2] = {kNone, kNone}, sums[2] = {};
  Sums output[kWidth / 8] = {};  // in pairs of 16 numbers: those at even places, those at odd places
};

// Scores of a chunk's positions, in base 2: the logarithm's factor is in the queries.
using Scores = Sums[kChunk / 8];

template <int kWidth>
__device__ inline void Score(const Tokens<kWidth>& tokens, const Rows<kWidth>& keys, Scores& scores) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < kChunk / 8; ++n) {
    scores[n] = {};
#pragma unroll
    for (int k = 0; k < kWidth / kTile; ++k) {
      const Half* const at = &keys.numbers[8 * n + g][kTile * k + 2 * t];
      MultiplyAdd(scores[n], tokens.queries[k], {WordAt(at), WordAt(at + 8)}, Half());
    }
  }
}

// Hides what a token does not see of the chunk at `start`.
template <int kWidth>
__device__ inline void Hide(const Tokens<kWidth>& tokens, int start, Scores& scores) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
  const int nearest = tokens.first - (start + kChunk - 1), farthest = tokens.first + kTile - 1 - start;
  if (nearest >= 0 && farthest <= tokens.farthest) return;
#pragma unroll
  for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int distance = tokens.first + g + i / 2 * 8 - (start + 8 * n + 2 * t + i % 2);
      if (distance < 0 || distance > tokens.farthest) scores[n].values[i] = kNone;
    }
  }
}

// Replaces scores by softmax weights. What was summed before is multiplied to be relative to the same largest score.
template <int kWidth>
__device__ inline void Weigh(Tokens<kWidth>& tokens, Scores& scores) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float largest = tokens.largest[row];
#pragma unroll
    for (const Sums& some : scores) {
      largest = fmaxf(largest, fmaxf(some.values[2 * row], some.values[2 * row + 1]));
    }
    largest = fmaxf(largest, ShuffleXor(largest, 1));
    largest = fmaxf(largest, ShuffleXor(largest, 2));
    const float shift = Shift(largest), kept = exp2f(tokens.largest[row] - shift);
    tokens.largest[row] = largest;
    tokens.sums[row] *= kept;
#pragma unroll
    for (Sums& some : scores) {
#pragma unroll
      for (int i = 2 * row; i < 2 * row + 2; ++i) {
        some.values[i] = exp2f(some.values[i] - shift);
        tokens.sums[row] += some.values[i];
      }
    }
#pragma unroll
    for (Sums& some : tokens.output) {
      some.values[2 * row] *= kept;
      some.values[2 * row + 1] *= kept;
    }
  }
}

// Adds the values, by their weights, to the output.
template <int kWidth>
__device__ inline void AddValues(const Scores& weights, const Rows<kWidth>& values, Tokens<kWidth>& tokens) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int k = 0; k < kChunk / kTile; ++k) {
    const float (&low)[4] = weights[2 * k].values, (&high)[4] = weights[2 * k + 1].values;
    const Left left = {RoundHalves(low[0], low[1]), RoundHalves(low[2], low[3]), RoundHalves(high[0], high[1]),
                       RoundHalves(high[2], high[3])};
#pragma unroll
    for (int n = 0; n < kWidth / kTile; ++n) {
      // A word holds two numbers of one position. Two words make a pair of positions for each of two products.
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = WordAt(&values.numbers[kTile * k + 2 * t + i / 2 * 8 + i % 2][kTile * n + 2 * g]);
      }
      const Right even = {Permute(words[0], words[1], 0x5410), Permute(words[2], words[3], 0x5410)};
      const Right odd = {Permute(words[0], words[1], 0x7632), Permute(words[2], words[3], 0x7632)};
      MultiplyAdd(tokens.output[2 * n], left, even, Half());
      MultiplyAdd(tokens.output[2 * n + 1], left, odd, Half());
    }
  }
}

template <int kWidth>
__device__ inline void Write(const CachedAttentionArguments& given, const Head& head, const Piece& piece,
                             int64_t query_head, const Tokens<kWidth>& tokens) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float sum = tokens.sums[row];
    sum += ShuffleXor(sum, 1);
    sum += ShuffleXor(sum, 2);
    const int token = static_cast<int>(threadIdx.x) / kWarpSize * kTile + g + 8 * row;
    if (token >= piece.tokens) continue;
    const float factor = 1.0f / sum;
    float* const to = given.output + ((head.first_token + token) * given.heads + query_head) * head.size;
#pragma unroll
    for (int n = 0; n < kWidth / kTile; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int number = kTile * n + 4 * t + i;
        if (number < head.size) to[number] = tokens.output[2 * n + i % 2].values[2 * row + i / 2] * factor;
      }
    }
  }
}

// The tokens from `first` on, at most `most` of them.
__device__ inline Piece PieceOf(const CachedAttentionArguments& given, int64_t first, int most, float scale) {
  const int tokens = static_cast<int>(Min(most, given.tokens - first));
  return {first, tokens, static_cast<int>(given.heads / given.kv_heads), 0, scale};
}

template <Storage storage>
__global__ void __launch_bounds__(kThreads, 1) AppendKernel(CachedAttentionArguments given) {
  using Stored = typename StoredAs<storage>::Type;
  auto& unused = Shared<NewRows<Stored, kAppended>>();  // where decode.cu has its threads find the new rows
  WaitForPrevious();
  AllowNext();
  const Piece piece = PieceOf(given, static_cast<int64_t>(blockIdx.x) * kAppended, kAppended, 0.0f);
  const Head head = HeadOf<kAppended>(given, piece);
  Stored* const keys = static_cast<Stored*>(given.keys) + head.first_row * head.size;
  Stored* const values = static_cast<Stored*>(given.values) + head.first_row * head.size;
  Append(given, head, keys, values, {head.past, Least(head.end, head.capacity)}, unused);
}

// Blocks per multiprocessor: as many as the registers of every architecture allow without spills.
constexpr int LeastBlocks(int width) { return width == 64 ? 3 : 2; }

template <Storage storage, int kWidth>
__global__ void __launch_bounds__(kThreads, LeastBlocks(kWidth))
    AttentionPrefillKernel(CachedAttentionArguments given, float scale) {
  using Stored = typename StoredAs<storage>::Type;
  auto& memory = Shared<PrefillMemory<kWidth>>();
  WaitForPrevious();
  AllowNext();
  const int group = static_cast<int>(given.heads / given.kv_heads), block = static_cast<int>(blockIdx.x);
  // A head's last tokens, which see the most, come first: no long block starts when the others are done.
  const int tile = (static_cast<int>(gridDim.x) - 1 - block) / group;
  const Piece piece = PieceOf(given, static_cast<int64_t>(tile) * kTokens, kTokens, scale);
  const Head head = HeadOf<kTokens>(given, piece);
  const int64_t query_head = head.first_query + block % group;
  const Stored* const keys = static_cast<const Stored*>(given.keys) + head.first_row * head.size;
  const Stored* const values = static_cast<const Stored*>(given.values) + head.first_row * head.size;
  const Seen seen = {head.window > 0 && head.past > head.window ? head.past - head.window : 0,
                     Least(head.end, head.capacity)};

  Staged<Stored, kWidth> staged;
  Load(head, keys, given.key_scales, head.first_chunk * kChunk, seen, staged);
  RotateQueries(given, head, piece, query_head, memory.values);
  SyncThreads();
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  Tokens<kWidth> tokens;
  tokens.first = head.past + warp * kTile;
  tokens.farthest = head.window > 0 ? head.window : head.capacity;
#pragma unroll
  for (int k = 0; k < kWidth / kTile; ++k) {
    const Half* const top = &memory.values.numbers[warp * kTile + lane / 4][kTile * k + lane % 4 * 2];
    const Half* const bottom = top + 8 * (kWidth + kPadding);
    tokens.queries[k] = {WordAt(top), WordAt(bottom), WordAt(top + 8), WordAt(bottom + 8)};
  }

  for (int start = head.first_chunk * kChunk; start < seen.end; start += kChunk) {
    Store(staged, memory.keys);
    Load(head, values, given.value_scales, start, seen, staged);
    SyncThreads();  // the keys are there, and no warp needs what was in `values`
    Scores scores;
    Score(tokens, memory.keys, scores);
    Store(staged, memory.values);
    Load(head, keys, given.key_scales, start + kChunk, seen, staged);
    SyncThreads();  // the values are there, and no warp needs the keys
    Hide(tokens, start, scores);
    Weigh(tokens, scores);
    AddValues(scores, memory.values, tokens);
  }
  Write(given, head, piece, query_head, tokens);
}

template <int kWidth>
auto KernelOf(Storage cache) {
  return cache == Storage::kInt8 ? AttentionPrefillKernel<Storage::kInt8, kWidth>
                                 : AttentionPrefillKernel<Storage::kFloat16, kWidth>;
}

}  // namespace

Status CachedAttentionPrefill(const CachedAttentionArguments& given, Stream stream) {
  if (const Status wrong = CheckOperands(given)) return wrong;
  if (given.cache == Storage::kBFloat16) return "[cached_attention] caches of a prompt must be float16 or int8";
  const auto append = given.cache == Storage::kInt8 ? AppendKernel<Storage::kInt8> : AppendKernel<Storage::kFloat16>;
  const Grid pieces = {CeilDivide(given.tokens, kAppended), given.kv_heads, given.batch};
  if (const Status wrong = Launch(append, pieces, dim3(kThreads), stream, given)) return wrong;
  const auto attend = given.head_size <= 64   ? KernelOf<64>(given.cache)
                      : given.head_size <= 96 ? KernelOf<96>(given.cache)
                                              : KernelOf<128>(given.cache);
  const Grid tiles = {CeilDivide(given.tokens, kTokens) * (given.heads / given.kv_heads), given.kv_heads, given.batch};
  const float scale = 1.44269504f / std::sqrt(static_cast<float>(given.head_size));  // log2(e)
  return Launch(attend, tiles, dim3(kThreads), stream, given, scale);
}

}  // namespace healthgpt::cuda
