// The kernel of CachedAttention, compiled once per target (simd/simd.h).
//
// A task takes rows of one key/value head. A row is one query head at one position; all query heads of a group read the
// same keys. Keys are taken in blocks of kKeys from position 0 on, with a running softmax (Dao et al., 2022, arXiv
// 2205.14135), so a row's sums always have the same order. The numbers of int8 caches are multiplied without their
// scales: those of keys are multiplied into the scores, those of values into the softmax's weights ("shares").
#include "cached_attention/caches.h"
#include "cached_attention/target_kernels.h"
#include "scratch.h"
#include "simd/exponential.h"
#include "simd/simd.h"
#include "simd/sizes.h"

namespace healthgpt {
namespace {

constexpr int64_t kKeys = 64;         // positions per block
constexpr int64_t kRowsPerTask = 64;  // they share the widening of a block
// Rows that are multiplied at once with keys, and with values.
constexpr int kQueriesAtOnce = Simd::kInRegisters ? 3 : 1;
constexpr int kRowsAtOnce = Simd::kInRegisters ? 6 : 4;
// Up to this many rows read the caches in place, which widens every number once per kQueriesAtOnce rows. The value 24
// was measured with AVX2 and AVX-512.
constexpr int64_t kRowsInPlace = Simd::kInRegisters ? 24 : 2;
constexpr float kNone = -__builtin_inff();

// Vectors of sums per row that fit into registers with `rows` rows, beside shares or values.
constexpr int VectorsAtOnce(int rows) {
  if (Simd::kRegisters >= 32) return 4;
  return rows == 1 ? 8 : rows == 2 ? 6 : rows == 3 ? 4 : 2;
}

// Keys whose sums fit into registers with `rows` rows, beside a vector of each row.
constexpr int KeysAtOnce(int rows) {
  const int most = Simd::kRegisters >= 32 ? 8 : 4;
  return rows == 1 || kLanes < most ? kLanes : most;
}

// Rotary positions: number i of a head's first half is rotated with number i of its second half.
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
  // The first key that a row sees. The last one is its own position.
  int64_t first(int64_t row) const { return arguments.window > 0 ? Max(0, position(row) - arguments.window) : 0; }
  int64_t cached_row(int64_t position) const {
    return (batch * arguments.kv_heads + head) * arguments.capacity + position;
  }
  char* cached(void* cache, int64_t position) const {
    return static_cast<char*>(cache) + cached_row(position) * arguments.head_size * CacheBytes(arguments.cache);
  }
  // Null if the caches have no scales.
  float* scales(float* of_all, int64_t position) const {
    return arguments.cache == Storage::kInt8 ? of_all + cached_row(position) : nullptr;
  }
};

void Append(const Head& head, float* rotated) {
  const CachedAttentionArguments& given = head.arguments;
  const int64_t size = given.head_size, half = size / 2;
  for (int64_t token = 0; token < given.tokens; ++token) {
    const int64_t at = head.batch * given.tokens + token, within = head.head * size;
    const float* value = given.value + at * given.value_stride + within;
    Rotate(given.key + at * given.key_stride + within, given.cosine + at * half, given.sine + at * half, size, 1.0f,
           rotated);
    const int64_t position = head.past + token;
    StoreCached(given.cache, rotated, size, head.cached(given.keys, position), head.scales(given.key_scales, position));
    StoreCached(given.cache, value, size, head.cached(given.values, position),
                head.scales(given.value_scales, position));
  }
}

// Keys or values of one block: a float32 copy in the L1 cache, or in place.
struct Block {
  const void* at;
  int64_t stride;  // numbers between two positions
};

// What to prefetch: as many rows as the block has, of row_bytes each. They are prefetched one by one during the
// arithmetic, because a burst of prefetches would delay the loads after it.
struct Next {
  const char* at;
  int64_t row_bytes;

  Next If(bool wanted) const { return {at, wanted ? row_bytes : 0}; }
  void Fetch(int64_t row, int64_t count) const {
    const bool near = Simd::PrefetchesNear();
    const char* from = at + row * row_bytes;
    for (int64_t line = 0; line < count * row_bytes; line += 64) {
      near ? __builtin_prefetch(from + line, 0, 3) : __builtin_prefetch(from + line, 0, 2);
    }
  }
};

// scores (kRows, kKeys) = queries (kRows, width) times each key of the block. Scores past the last key are arbitrary
// and not used.
template <Storage storage, int kRows>
void Score(const float* queries, const Block& keys, int64_t count, int64_t width, const Next& next, float* scores) {
  constexpr int kCount = KeysAtOnce(kRows);
  for (int64_t key = 0; key < count; key += kLanes) {
    next.Fetch(key, kLanes);
    Floats sums[kRows][kLanes];
    for (int from = 0; from < kLanes; from += kCount) {
      Floats some[kRows][kCount];
      Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
        Unroll<kCount>([&](auto i) SIMD_INLINE_LAMBDA { some[r][i] = Simd::Repeat(0.0f); });
      });
      for (int64_t at = 0; at < width; at += kLanes) {
        Floats factors[kRows];
        Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA { factors[r] = Simd::Load(queries + r * width + at); });
        Unroll<kCount>([&](auto i) SIMD_INLINE_LAMBDA {
          const Floats vector = LoadVector<storage>(keys.at, (key + from + i) * keys.stride + at);
          Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
            some[r][i] = Simd::MultiplyAdd(vector, factors[r], some[r][i]);
            SIMD_KEEP(some[r][i]);
          });
        });
      }
      Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
        Unroll<kCount>([&](auto i) SIMD_INLINE_LAMBDA { sums[r][from + i] = some[r][i]; });
      });
    }
    Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA { Simd::Store(scores + r * kKeys + key, Simd::SumEach(sums[r])); });
  }
}

// totals (kRows, width) = totals * corrections + shares (kRows, kKeys) times the values of the block, for kCount
// vectors of the width from `at` on.
template <Storage storage, int kRows, int kCount>
void AddValues(const float* shares, const Block& values, int64_t count, int64_t at, int64_t width, const Next& next,
               const float* corrections, float* totals) {
  Floats sums[kRows][kCount];
  Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
    const Floats correction = Simd::Repeat(corrections[r]);
    Unroll<kCount>([&](auto i) SIMD_INLINE_LAMBDA {
      sums[r][i] = Simd::Multiply(Simd::Load(totals + r * width + at + i * kLanes), correction);
    });
  });
  for (int64_t key = 0; key < count; ++key) {
    next.Fetch(key, 1);
    // Registers hold all shares and one value, or all values and one share, whichever takes fewer.
    if constexpr (kRows < kCount) {
      Floats share[kRows];
      Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA { share[r] = Simd::Repeat(shares[r * kKeys + key]); });
      Unroll<kCount>([&](auto i) SIMD_INLINE_LAMBDA {
        const Floats value = LoadVector<storage>(values.at, key * values.stride + at + i * kLanes);
        Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
          sums[r][i] = Simd::MultiplyAdd(share[r], value, sums[r][i]);
          SIMD_KEEP(sums[r][i]);
        });
      });
    } else {
      Floats value[kCount];
      Unroll<kCount>([&](auto i) SIMD_INLINE_LAMBDA {
        value[i] = LoadVector<storage>(values.at, key * values.stride + at + i * kLanes);
      });
      Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
        const Floats share = Simd::Repeat(shares[r * kKeys + key]);
        Unroll<kCount>([&](auto i) SIMD_INLINE_LAMBDA {
          sums[r][i] = Simd::MultiplyAdd(share, value[i], sums[r][i]);
          SIMD_KEEP(sums[r][i]);
        });
      });
    }
  }
  Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
    Unroll<kCount>([&](auto i) SIMD_INLINE_LAMBDA { Simd::Store(totals + r * width + at + i * kLanes, sums[r][i]); });
  });
}

// AddValues from `at` to the end of the width: kCount vectors at a time, then smaller numbers for the rest.
template <Storage storage, int kRows, int kCount = VectorsAtOnce(kRows)>
void AddAllValues(const float* shares, const Block& values, int64_t count, int64_t width, const Next& next,
                  const float* corrections, float* totals, int64_t at) {
  for (; at + kCount * kLanes <= width; at += kCount * kLanes) {
    AddValues<storage, kRows, kCount>(shares, values, count, at, width, next.If(at == 0), corrections, totals);
  }
  if constexpr (kCount > 1) {
    AddAllValues<storage, kRows, kCount / 2>(shares, values, count, width, next, corrections, totals, at);
  }
}

// Score for all rows of a task. `ends` says how many keys of the block each row sees at most, a later one as many or
// more; rows that are multiplied at once go through those of the last.
template <Storage storage>
void ScoreRows(const float* query, int64_t rows, const Block& keys, const int64_t* ends, int64_t width,
               const Next& next, float* scores) {
  for (int64_t row = 0; row < rows; row += kQueriesAtOnce) {
    const int64_t some = Min(kQueriesAtOnce, rows - row);
    const auto score = Pick(some, Score<storage, 1>, Score<storage, 2>, Score<storage, 3>);
    score(query + row * width, keys, ends[row + some - 1], width, next.If(row == 0), scores + row * kKeys);
  }
}

// AddAllValues for all rows of a task, in the same way.
template <Storage storage>
void AddRows(const float* shares, int64_t rows, const Block& values, const int64_t* ends, int64_t width,
             const Next& next, const float* corrections, float* totals) {
  for (int64_t row = 0; row < rows; row += kRowsAtOnce) {
    const int64_t some = Min(kRowsAtOnce, rows - row);
    const auto add = Pick(some, AddAllValues<storage, 1>, AddAllValues<storage, 2>, AddAllValues<storage, 3>,
                          AddAllValues<storage, 4>, AddAllValues<storage, 5>, AddAllValues<storage, 6>);
    add(shares + row * kKeys, values, ends[row + some - 1], width, next.If(row == 0), corrections + row,
        totals + row * width, 0);
  }
}

// Turns a row's scores of one block into shares of its running softmax. Keys outside [first, end) of the block get 0.
// Returns the factor for the earlier blocks' sums.
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
  // Before the first block there are no sums.
  const float correction = before == kNone ? 0.0f : __builtin_expf(before - now);
  *total = *total * correction + Simd::Sum(sums);
  *largest = now;
  return correction;
}

// Attention of rows [begin, begin + count) of a head.
template <Storage cache>
void Attend(const Head& head, int64_t begin, int64_t count, float* memory) {
  const CachedAttentionArguments& given = head.arguments;
  const int64_t size = given.head_size, half = size / 2, width = head.width;
  float* block = memory;                          // (kKeys, width)
  float* query = block + kKeys * width;           // (kRowsPerTask, width)
  float* totals = query + kRowsPerTask * width;   // (kRowsPerTask, width)
  float* scores = totals + kRowsPerTask * width;  // (kRowsPerTask, kKeys)
  float largest[kRowsPerTask], total[kRowsPerTask], corrections[kRowsPerTask];
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(size));
  for (int64_t i = 0; i < count * width; i += kLanes) {
    Simd::Store(query + i, Simd::Repeat(0.0f));
    Simd::Store(totals + i, Simd::Repeat(0.0f));
  }
  for (int64_t row = 0; row < count; ++row) {
    const int64_t at = head.batch * given.tokens + (begin + row) / head.group;
    const int64_t query_head = head.head * head.group + (begin + row) % head.group;
    Rotate(given.query + at * given.query_stride + query_head * size, given.cosine + at * half, given.sine + at * half,
           size, scale, query + row * width);
    largest[row] = kNone;
    total[row] = 0.0f;
  }
  const int64_t last = head.position(begin + count - 1);
  for (int64_t start = head.first(begin) / kKeys * kKeys; start <= last; start += kKeys) {
    const int64_t keys = Min(kKeys, last + 1 - start);
    // Whole blocks of whole vectors are read in place, unless they are not float32 and many rows read them. The results
    // are the same.
    const bool few = count <= kRowsInPlace || cache == Storage::kFloat32;
    const bool in_place = few && keys == kKeys && size == width;
    const auto open = [&](void* rows) {
      if (in_place) return Block{head.cached(rows, start), size};
      LoadCached<cache>(head.cached(rows, start), keys, size, width, block);
      return Block{block, width};
    };
    int64_t ends[kRowsPerTask];
    for (int64_t row = 0; row < count; ++row) ends[row] = Max(0, Min(kKeys, head.position(begin + row) + 1 - start));
    const float* key_scales = head.scales(given.key_scales, start);
    const float* value_scales = head.scales(given.value_scales, start);
    // Prefetch what comes next: the values of this block, then the keys of the next block.
    const int64_t row_bytes = size * CacheBytes(cache);
    const auto score = in_place ? ScoreRows<cache> : ScoreRows<Storage::kFloat32>;
    score(query, count, open(given.keys), ends, width, {head.cached(given.values, start), row_bytes}, scores);
    for (int64_t row = 0; row < count; ++row) {
      const int64_t first = Max(0, head.first(begin + row) - start);
      float* of_row = scores + row * kKeys;
      if (key_scales != nullptr) MultiplyByScales(of_row, key_scales, keys);
      corrections[row] = Share(of_row, first, ends[row], largest + row, total + row);
      if (value_scales != nullptr) MultiplyByScales(of_row, value_scales, keys);
    }
    const auto add = in_place ? AddRows<cache> : AddRows<Storage::kFloat32>;
    add(scores, count, open(given.values), ends, width, {head.cached(given.keys, start + kKeys), row_bytes},
        corrections, totals);
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
  const auto attend = arguments.cache == Storage::kInt8      ? Attend<Storage::kInt8>
                      : arguments.cache == Storage::kFloat16 ? Attend<Storage::kFloat16>
                                                             : Attend<Storage::kFloat32>;
  // A head's rows need all its new keys. If they are a single task, that task appends the keys.
  if (chunks > 1) {
    parallel(static_cast<size_t>(heads), [&](size_t index) { Append(head_of(static_cast<int64_t>(index)), memory()); });
  }
  parallel(static_cast<size_t>(heads * chunks), [&](size_t index) {
    const Head head = head_of(static_cast<int64_t>(index) / chunks);
    // The last rows see the most keys. They start first, so that no thread is left with them at the end.
    const int64_t begin = (chunks - 1 - static_cast<int64_t>(index) % chunks) * kRowsPerTask;
    if (chunks == 1) Append(head, memory());
    attend(head, begin, Min(kRowsPerTask, rows - begin), memory());
  });
}

}  // namespace healthgpt
