// The kernel of PackedAttention, compiled once per target (simd/simd.h).
//
// Queries are the lanes of vectors, so scores are (keys, queries): a softmax goes down a column, and nothing is summed
// across a vector. A task takes some groups of queries of one head. Keys are taken in blocks with a running softmax
// (Dao et al., 2022, arXiv 2205.14135); a block is copied once for all groups of a task, because rows of the packed
// tensor lie far apart.
#include "packed_attention/target_kernels.h"
#include "scratch.h"
#include "simd/exponential.h"
#include "simd/simd.h"
#include "simd/sizes.h"

namespace healthgpt {
namespace {

using Floats = Simd::Floats;

constexpr int64_t kLanes = Simd::kLanes;
constexpr int64_t kQueries = 64;  // of a group
constexpr int64_t kGroups = 2;    // per task, at most
constexpr int64_t kKeys = 64;     // per block
// Rows of a product, and vectors of queries, whose sums fit into registers.
constexpr int kRowsAtOnce = Simd::kInRegisters ? 6 : 4;
constexpr int kVectorsAtOnce = Simd::kRegisters >= 32 ? 4 : 2;

// A matrix that is read number by number.
struct Left {
  const float* at;
  int64_t row, column;  // numbers from one row to the next, and from one column to the next
};

// sums (kRows, kQueries) = left (kRows, count) times right (count, kQueries), for kCount vectors of queries; added to
// what is there if kAdds.
template <bool kAdds, int kRows, int kCount>
SIMD_INLINE void Multiply(const Left& left, const float* right, int64_t count, float* sums) {
  Floats some[kRows][kCount];
  Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
    Unroll<kCount>([&](auto i) SIMD_INLINE_LAMBDA {
      some[r][i] = kAdds ? Simd::Load(sums + r * kQueries + i * kLanes) : Simd::Repeat(0.0f);
    });
  });
  const float* numbers = left.at;
  for (int64_t k = 0; k < count; ++k, numbers += left.column, right += kQueries) {
    Floats vectors[kCount];
    Unroll<kCount>([&](auto i) SIMD_INLINE_LAMBDA { vectors[i] = Simd::Load(right + i * kLanes); });
    Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
      const Floats number = Simd::Repeat(numbers[r * left.row]);
      Unroll<kCount>([&](auto i) SIMD_INLINE_LAMBDA {
        some[r][i] = Simd::MultiplyAdd(number, vectors[i], some[r][i]);
        SIMD_KEEP(some[r][i]);
      });
    });
  }
  Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
    Unroll<kCount>([&](auto i) SIMD_INLINE_LAMBDA { Simd::Store(sums + r * kQueries + i * kLanes, some[r][i]); });
  });
}

// Multiply for the first `queries` queries, in whole vectors.
template <bool kAdds, int kRows>
void MultiplyQueries(const Left& left, const float* right, int64_t count, int64_t queries, float* sums) {
  int64_t at = 0;
  for (; at + (kVectorsAtOnce - 1) * kLanes < queries; at += kVectorsAtOnce * kLanes) {
    Multiply<kAdds, kRows, kVectorsAtOnce>(left, right + at, count, sums + at);
  }
  for (; at < queries; at += kLanes) Multiply<kAdds, kRows, 1>(left, right + at, count, sums + at);
}
static_assert(kQueries % (kVectorsAtOnce * kLanes) == 0);

// MultiplyQueries for all rows.
template <bool kAdds>
void MultiplyRows(const Left& left, int64_t rows, const float* right, int64_t count, int64_t queries, float* sums) {
  for (int64_t row = 0; row < rows; row += kRowsAtOnce) {
    const auto multiply = Pick(Min(kRowsAtOnce, rows - row), MultiplyQueries<kAdds, 1>, MultiplyQueries<kAdds, 2>,
                               MultiplyQueries<kAdds, 3>, MultiplyQueries<kAdds, 4>, MultiplyQueries<kAdds, 5>,
                               MultiplyQueries<kAdds, 6>);
    multiply({left.at + row * left.row, left.row, left.column}, right, count, queries, sums + row * kQueries);
  }
}

// The queries, keys or values of a head: (T, D), `stride` numbers from one token to the next.
struct Rows {
  const float* at;
  int64_t stride;

  const float* operator[](int64_t token) const { return at + token * stride; }
  void Copy(int64_t first, int64_t count, int64_t size, float* to) const {
    for (int64_t i = 0; i < count; ++i, to += size) {
      const float* from = (*this)[first + i];
      for (int64_t at = 0; at < size; at += kLanes) {
        const int left = static_cast<int>(Min(kLanes, size - at));
        Simd::Store(to + at, Simd::Load(from + at, left), left);
      }
    }
  }
};

// Up to kQueries queries of a head, from token `first` on, and what they have seen so far.
struct Group {
  int64_t first, count, size;  // size: D
  float* queries;              // (D, kQueries), scaled by 1 / sqrt(D)
  float* totals;               // (D, kQueries): the values seen, each times its share of the softmax
  float* shares;               // (kKeys, kQueries): a block's scores, then e^(score - largest)
  float* largest;              // (kQueries), of the scores seen
  float* total;                // (kQueries), of the shares seen

  static int64_t Numbers(int64_t size) { return (2 * size + kKeys + 2) * kQueries; }

  // Begins with the queries from token `begin` on, of `tokens`; memory holds Numbers(head_size) numbers.
  void Begin(const Rows& query, int64_t begin, int64_t tokens, int64_t head_size, float* memory) {
    first = begin;
    count = Min(kQueries, tokens - first);
    size = head_size;
    queries = memory;
    totals = queries + size * kQueries;
    shares = totals + size * kQueries;
    largest = shares + kKeys * kQueries;
    total = largest + kQueries;
    for (int64_t i = 0; i < 2 * size * kQueries; i += kLanes) Simd::Store(queries + i, Simd::Repeat(0.0f));
    for (int64_t i = 0; i < kQueries; i += kLanes) {
      Simd::Store(largest + i, Simd::Repeat(-__builtin_inff()));
      Simd::Store(total + i, Simd::Repeat(0.0f));
    }
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(size));
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t at = 0; at < size; ++at) queries[at * kQueries + i] = query[first + i][at] * scale;
    }
  }

  // Goes through a block of keys (keys, D): first the shares, then the values.
  void Score(const float* block, int64_t keys) const {
    MultiplyRows<false>({block, size, 1}, keys, queries, size, count, shares);
    for (int64_t at = 0; at < count; at += kLanes) Share(keys, at);
  }
  void AddValues(const float* block, int64_t keys) const {
    MultiplyRows<true>({block, 1, size}, size, shares, keys, count, totals);
  }

  // Writes the attention of each query to a row of `output`.
  void Finish(float* output, int64_t stride) const {
    for (int64_t at = 0; at < count; at += kLanes) {
      const Floats sum = Simd::Load(total + at);
      for (int64_t i = 0; i < size; ++i) {
        float* mean = totals + i * kQueries + at;
        Simd::Store(mean, Simd::Divide(Simd::Load(mean), sum));
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t at = 0; at < size; ++at) output[(first + i) * stride + at] = totals[at * kQueries + i];
    }
  }

 private:
  // Turns the scores of kLanes queries from `at` on into shares.
  void Share(int64_t keys, int64_t at) const {
    constexpr int kPeaks = 4;  // in turn, because each comparison takes a few cycles
    const Floats before = Simd::Load(largest + at);
    Floats peaks[kPeaks], sum = Simd::Repeat(0.0f);
    Unroll<kPeaks>([&](auto i) SIMD_INLINE_LAMBDA { peaks[i] = before; });
    int64_t key = 0;
    for (; key + kPeaks <= keys; key += kPeaks) {
      Unroll<kPeaks>([&](auto i) SIMD_INLINE_LAMBDA {
        peaks[i] = Simd::Max(peaks[i], Simd::Load(shares + (key + i) * kQueries + at));
      });
    }
    for (; key < keys; ++key) peaks[0] = Simd::Max(peaks[0], Simd::Load(shares + key * kQueries + at));
    const Floats now = Simd::Max(Simd::Max(peaks[0], peaks[1]), Simd::Max(peaks[2], peaks[3]));
    const Floats shift = Simd::Multiply(now, Simd::Repeat(-1.0f));
    for (key = 0; key < keys; ++key) {
      float* share = shares + key * kQueries + at;
      const Floats power = Exp(Simd::Add(Simd::Load(share), shift));
      Simd::Store(share, power);
      sum = Simd::Add(sum, power);
    }
    const Floats correction = Exp(Simd::Add(before, shift));  // before the first block nothing is corrected
    Simd::Store(total + at, Simd::MultiplyAdd(Simd::Load(total + at), correction, sum));
    Simd::Store(largest + at, now);
    for (int64_t i = 0; i < size; ++i) {
      float* of_values = totals + i * kQueries + at;
      Simd::Store(of_values, Simd::Multiply(Simd::Load(of_values), correction));
    }
  }
};

}  // namespace

void SIMD_KERNEL(PackedAttention)(const PackedAttentionArguments& given, const Parallel& parallel) {
  const int64_t tokens = given.tokens, size = given.head_size, width = given.heads * size;
  const int64_t parts = CeilDivide(tokens, kGroups * kQueries);
  parallel(static_cast<size_t>(given.batch * given.heads * parts), [&](size_t index) {
    const int64_t task = static_cast<int64_t>(index), first = task % parts * kGroups * kQueries;
    const int64_t head = task / parts % given.heads, batch = task / parts / given.heads;
    const float* packed = given.packed + batch * tokens * 3 * width + head * size;
    const Rows query = {packed, 3 * width}, key = {packed + width, 3 * width}, value = {packed + 2 * width, 3 * width};
    const int64_t numbers = kGroups * Group::Numbers(size) + kKeys * size;
    float* memory = static_cast<float*>(ScratchMemory(Scratch::kTask, static_cast<size_t>(numbers) * sizeof(float)));
    float* block = memory + kGroups * Group::Numbers(size);
    Group groups[kGroups];
    int64_t count = 0;
    for (; count < kGroups && first + count * kQueries < tokens; ++count) {
      groups[count].Begin(query, first + count * kQueries, tokens, size, memory + count * Group::Numbers(size));
    }
    for (int64_t start = 0; start < tokens; start += kKeys) {
      const int64_t keys = Min(kKeys, tokens - start);
      key.Copy(start, keys, size, block);
      for (int64_t i = 0; i < count; ++i) groups[i].Score(block, keys);
      value.Copy(start, keys, size, block);
      for (int64_t i = 0; i < count; ++i) groups[i].AddValues(block, keys);
    }
    for (int64_t i = 0; i < count; ++i) groups[i].Finish(given.output + batch * tokens * width + head * size, width);
  });
}

}  // namespace healthgpt
