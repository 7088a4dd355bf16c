// The kernel of CachedAttention, compiled once per target; see hlora_linear/kernel.cc for the rules of such a file.
//
// A task takes rows of one key/value head: a row is one query head at one position, and all query heads of the group
// read the same keys. Keys go by in blocks of kKeys from position 0, with a running softmax (Dao et al., 2022, arXiv
// 2205.14135): a row's sums are always made in that order, whatever else is in the call.
#include "cached_attention/target_kernels.h"
#include "scratch.h"
#include "simd/simd.h"

namespace healthgpt {
namespace {

using Floats = Simd::Floats;

constexpr int64_t kLanes = Simd::kLanes;
constexpr int64_t kKeys = 64;         // positions per block
constexpr int64_t kRowsPerTask = 64;  // so many share the widening of a block
constexpr int kRowsAtOnce = 4;        // times kVectors sums stay in registers
constexpr int kVectors = 4;
constexpr float kNone = -__builtin_inff();

int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t b) { return CeilDivide(a, b) * b; }

// e^x for x up to 0, to 2 units in the last place; below -87 it stays at e^-87.
SIMD_INLINE Floats Exp(Floats x) {
  x = Simd::Max(Simd::Repeat(-87.0f), x);  // in this order NaN stays NaN
  const Floats whole = Simd::Round(Simd::Multiply(x, Simd::Repeat(1.44269504f)));
  Floats rest = Simd::MultiplyAdd(whole, Simd::Repeat(-0.693359375f), x);
  rest = Simd::MultiplyAdd(whole, Simd::Repeat(2.12194440e-4f), rest);
  Floats power = Simd::Repeat(1.0f / 720);
  constexpr float coefficients[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (const float coefficient : coefficients) {
    power = Simd::MultiplyAdd(power, rest, Simd::Repeat(coefficient));
  }
  return Simd::Multiply(power, Simd::PowerOfTwo(whole));
}

// --- caches -----------------------------------------------------------------------------------------------------

int64_t CacheBytes(Storage cache) { return cache == Storage::kFloat16 ? 2 : 4; }

void StoreCached(Storage cache, void* to, const float* from, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    if (cache == Storage::kFloat16) {
      Simd::StoreHalf(static_cast<uint16_t*>(to) + i, Simd::Load(from + i));
    } else {
      Simd::Store(static_cast<float*>(to) + i, Simd::Load(from + i));
    }
  }
  if (i == count) return;
  if (cache == Storage::kFloat32)
    return Simd::Store(static_cast<float*>(to) + i, Simd::Load(from + i, static_cast<int>(count - i)),
                       static_cast<int>(count - i));
  uint16_t halves[kLanes];
  Simd::StoreHalf(halves, Simd::Load(from + i, static_cast<int>(count - i)));
  for (int64_t j = i; j < count; ++j) static_cast<uint16_t*>(to)[j] = halves[j - i];
}

// `count` cached rows of D numbers, widened to rows of `width` with zeros.
void LoadCached(Storage cache, const void* from, int64_t count, int64_t size, int64_t width, float* to) {
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t i = 0; i < size; i += kLanes) {
      const int64_t at = row * size + i;
      const int left = static_cast<int>(size - i);
      Floats values;
      if (cache == Storage::kFloat16) {
        const uint16_t* halves = static_cast<const uint16_t*>(from) + at;
        values = left >= kLanes ? Simd::LoadHalf(halves) : Simd::LoadHalf(halves, left);
      } else {
        const float* floats = static_cast<const float*>(from) + at;
        values = left >= kLanes ? Simd::Load(floats) : Simd::Load(floats, left);
      }
      Simd::Store(to + row * width + i, values);
    }
  }
}

// Rotary positions: the first half of a head is turned against the second.
void Rotate(const float* head, const float* cosine, const float* sine, int64_t size, float scale, float* to) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = head[i], second = head[half + i];
    to[i] = (first * cosine[i] - second * sine[i]) * scale;
    to[half + i] = (second * cosine[i] + first * sine[i]) * scale;
  }
}

// --- one task ---------------------------------------------------------------------------------------------------

struct Head {
  const CachedAttentionArguments& arguments;
  int64_t batch, head, group, width;  // width: D rounded up to vectors
  int64_t past;

  int64_t position(int64_t row) const { return past + row / group; }
  // The first and the last key that a row sees.
  int64_t first(int64_t row) const { return arguments.window > 0 ? Max(0, position(row) - arguments.window) : 0; }
  char* cached(void* cache, int64_t position) const {
    const int64_t at = ((batch * arguments.kv_heads + head) * arguments.capacity + position) * arguments.head_size;
    return static_cast<char*>(cache) + at * CacheBytes(arguments.cache);
  }
};

void Append(const Head& head, float* rotated) {
  const CachedAttentionArguments& given = head.arguments;
  const int64_t size = given.head_size, half = size / 2;
  for (int64_t token = 0; token < given.tokens; ++token) {
    const int64_t at = head.batch * given.tokens + token, from = (at * given.kv_heads + head.head) * size;
    Rotate(given.key + from, given.cosine + at * half, given.sine + at * half, size, 1.0f, rotated);
    StoreCached(given.cache, head.cached(given.keys, head.past + token), rotated, size);
    StoreCached(given.cache, head.cached(given.values, head.past + token), given.value + from, size);
  }
}

// scores (rows, kKeys) = query (rows, width) times the keys (count, width).
template <int kRows>
void Score(const float* query, const float* keys, int64_t count, int64_t width, float* scores) {
  for (int64_t key = 0; key < count; ++key) {
    Floats sums[kRows];
    Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA { sums[r] = Simd::Repeat(0.0f); });
    for (int64_t i = 0; i < width; i += kLanes) {
      const Floats values = Simd::Load(keys + key * width + i);
      Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
        sums[r] = Simd::MultiplyAdd(values, Simd::Load(query + r * width + i), sums[r]);
        SIMD_KEEP(sums[r]);
      });
    }
    Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA { scores[r * kKeys + key] = Simd::Sum(sums[r]); });
  }
}

// totals (rows, width) = totals * corrections + shares (rows, kKeys) times the values (count, width), for kCount
// vectors of the width.
template <int kRows, int kCount>
void AddValues(const float* shares, const float* values, int64_t count, int64_t width, const float* corrections,
               float* totals) {
  Floats sums[kRows][kCount];
  Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
    const Floats correction = Simd::Repeat(corrections[r]);
    Unroll<kCount>([&](auto i) SIMD_INLINE_LAMBDA {
      sums[r][i] = Simd::Multiply(Simd::Load(totals + r * width + i * kLanes), correction);
    });
  });
  for (int64_t key = 0; key < count; ++key) {
    Floats share[kRows];
    Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA { share[r] = Simd::Repeat(shares[r * kKeys + key]); });
    Unroll<kCount>([&](auto i) SIMD_INLINE_LAMBDA {
      const Floats value = Simd::Load(values + key * width + i * kLanes);
      Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
        sums[r][i] = Simd::MultiplyAdd(share[r], value, sums[r][i]);
        SIMD_KEEP(sums[r][i]);
      });
    });
  }
  Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
    Unroll<kCount>([&](auto i) SIMD_INLINE_LAMBDA { Simd::Store(totals + r * width + i * kLanes, sums[r][i]); });
  });
}

template <int kRows>
void AddAllValues(const float* shares, const float* values, int64_t count, int64_t width, const float* corrections,
                  float* totals) {
  int64_t i = 0;
  for (; i + kVectors * kLanes <= width; i += kVectors * kLanes) {
    AddValues<kRows, kVectors>(shares, values + i, count, width, corrections, totals + i);
  }
  const int64_t left = (width - i) / kLanes;
  if (left == 3) AddValues<kRows, 3>(shares, values + i, count, width, corrections, totals + i);
  if (left == 2) AddValues<kRows, 2>(shares, values + i, count, width, corrections, totals + i);
  if (left == 1) AddValues<kRows, 1>(shares, values + i, count, width, corrections, totals + i);
}

// A row's scores of one block to shares of its running softmax. Keys outside [first, end) of the block have none.
// Returns the factor for what was summed before.
float Share(float* scores, int64_t first, int64_t end, float* largest, float* total) {
  if (first >= end) {
    for (int64_t i = 0; i < kKeys; i += kLanes) Simd::Store(scores + i, Simd::Repeat(0.0f));
    return 1.0f;
  }
  for (int64_t i = 0; i < first; ++i) scores[i] = kNone;
  for (int64_t i = end; i < kKeys; ++i) scores[i] = kNone;
  Floats peaks = Simd::Load(scores);
  for (int64_t i = kLanes; i < kKeys; i += kLanes) peaks = Simd::Max(peaks, Simd::Load(scores + i));
  const float peak = Simd::Largest(peaks), before = *largest, now = peak > before ? peak : before;
  const Floats shift = Simd::Repeat(-now);
  for (int64_t i = 0; i < kKeys; i += kLanes) Simd::Store(scores + i, Exp(Simd::Add(Simd::Load(scores + i), shift)));
  for (int64_t i = 0; i < first; ++i) scores[i] = 0.0f;
  for (int64_t i = end; i < kKeys; ++i) scores[i] = 0.0f;
  Floats sums = Simd::Load(scores);
  for (int64_t i = kLanes; i < kKeys; i += kLanes) sums = Simd::Add(sums, Simd::Load(scores + i));
  // Nothing was summed before the first block.
  const float correction = before == kNone ? 0.0f : __builtin_expf(before - now);
  *total = *total * correction + Simd::Sum(sums);
  *largest = now;
  return correction;
}

// Attention of rows [begin, begin + count) of a head.
void Attend(const Head& head, int64_t begin, int64_t count, float* memory) {
  const CachedAttentionArguments& given = head.arguments;
  const int64_t size = given.head_size, half = size / 2, width = head.width;
  float* block = memory;                          // (kKeys, width)
  float* query = block + kKeys * width;           // (kRowsPerTask, width)
  float* totals = query + kRowsPerTask * width;   // (kRowsPerTask, width)
  float* scores = totals + kRowsPerTask * width;  // (kRowsPerTask, kKeys)
  float largest[kRowsPerTask], total[kRowsPerTask], corrections[kRowsPerTask];
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(size));
  for (int64_t i = 0; i < 2 * kRowsPerTask * width; i += kLanes) Simd::Store(query + i, Simd::Repeat(0.0f));
  for (int64_t row = 0; row < count; ++row) {
    const int64_t at = head.batch * given.tokens + (begin + row) / head.group;
    const int64_t query_head = head.head * head.group + (begin + row) % head.group;
    Rotate(given.query + (at * given.heads + query_head) * size, given.cosine + at * half, given.sine + at * half, size,
           scale, query + row * width);
    largest[row] = kNone;
    total[row] = 0.0f;
  }
  const int64_t last = head.position(begin + count - 1);
  for (int64_t start = head.first(begin) / kKeys * kKeys; start <= last; start += kKeys) {
    const int64_t keys = Min(kKeys, last + 1 - start);
    LoadCached(given.cache, head.cached(given.keys, start), keys, size, width, block);
    for (int64_t row = 0; row < count; row += kRowsAtOnce) {
      const auto score = Pick(Min(kRowsAtOnce, count - row), Score<1>, Score<2>, Score<3>, Score<4>);
      score(query + row * width, block, keys, width, scores + row * kKeys);
    }
    for (int64_t row = 0; row < count; ++row) {
      const int64_t first = Max(0, head.first(begin + row) - start);
      const int64_t end = Min(kKeys, head.position(begin + row) + 1 - start);
      corrections[row] = Share(scores + row * kKeys, first, end, largest + row, total + row);
    }
    LoadCached(given.cache, head.cached(given.values, start), keys, size, width, block);
    for (int64_t row = 0; row < count; row += kRowsAtOnce) {
      const auto add =
          Pick(Min(kRowsAtOnce, count - row), AddAllValues<1>, AddAllValues<2>, AddAllValues<3>, AddAllValues<4>);
      add(scores + row * kKeys, block, keys, width, corrections + row, totals + row * width);
    }
  }
  for (int64_t row = 0; row < count; ++row) {
    const int64_t at = head.batch * given.tokens + (begin + row) / head.group;
    const int64_t query_head = head.head * head.group + (begin + row) % head.group;
    float* to = given.output + (at * given.heads + query_head) * size;
    for (int64_t i = 0; i < size; ++i) to[i] = totals[row * width + i] / total[row];
  }
}

}  // namespace

void SIMD_KERNEL(CachedAttention)(const CachedAttentionArguments& arguments, const Parallel& parallel) {
  const int64_t group = arguments.heads / arguments.kv_heads, rows = arguments.tokens * group;
  const int64_t width = RoundUp(arguments.head_size, kLanes), chunks = CeilDivide(rows, kRowsPerTask);
  const int64_t heads = arguments.batch * arguments.kv_heads;
  if (rows == 0) return;
  const auto head_of = [&](int64_t index) {
    const int64_t batch = index / arguments.kv_heads;
    return Head{arguments, batch, index % arguments.kv_heads, group, width, arguments.past_length[batch]};
  };
  const auto memory = [&] {
    const int64_t floats = (kKeys + 2 * kRowsPerTask) * width + kRowsPerTask * kKeys;
    return static_cast<float*>(ScratchMemory(Scratch::kTask, static_cast<size_t>(floats) * sizeof(float)));
  };
  // A head's rows need all its new keys: where they are one task it appends them itself.
  if (chunks > 1) {
    parallel(static_cast<size_t>(heads), [&](size_t index) { Append(head_of(static_cast<int64_t>(index)), memory()); });
  }
  parallel(static_cast<size_t>(heads * chunks), [&](size_t index) {
    const Head head = head_of(static_cast<int64_t>(index) / chunks);
    // The last rows see the most keys: they start first, so that no thread is left with them at the end.
    const int64_t begin = (chunks - 1 - static_cast<int64_t>(index) % chunks) * kRowsPerTask;
    if (chunks == 1) Append(head, memory());
    Attend(head, begin, Min(kRowsPerTask, rows - begin), memory());
  });
}

}  // namespace healthgpt
