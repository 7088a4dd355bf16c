// One block per sequence. Sampling is a race: the token with the largest probability / exponential time wins. The limit
// of top_p is found without a sort. Every token has a key that orders it by score; a radix search fixes one byte of the
// limit's key at a time, from a histogram of probability mass by that byte. Masses are integers, so their sums do not
// depend on the order of addition.
#include "cuda/launch.cuh"
#include "cuda/numbers.cuh"
#include "token_selection/cuda.h"

namespace healthgpt::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBins = 256;
constexpr int kKeyBits = 32 + 24;              // score, row
constexpr float kMassUnit = 1099511627776.0f;  // 2^40: the sum of 2^24 masses fits into 64 bits
constexpr float kNone = -INFINITY;

struct Best {
  float score;
  int64_t row;
};
__device__ inline Best Better(const Best& a, const Best& b) {
  return b.score > a.score || (b.score == a.score && b.row < a.row) ? b : a;
}

struct Memory {
  uint64_t masses[kBins];
  uint64_t sums[kBins / 8];
  uint64_t before, prefix;  // the mass of all larger keys; the bytes of the key found so far
  Best largest[kWarps], winners[kWarps];
};

// The logit of a row, penalised if it was chosen before; -inf if it is not allowed.
__device__ inline float ScoreOf(const TokenSelectionArguments& given, int64_t row) {
  const int64_t at = blockIdx.x * given.rows + row;
  float score = given.logits[at];
  if (given.seen != nullptr && given.seen[at] != 0) score = score < 0 ? score * given.penalty : score / given.penalty;
  if (given.allowed != nullptr && (given.allowed[row / 32] >> (row % 32) & 1u) == 0) score = kNone;
  return score;
}

// A larger key for a larger score, and among equal scores for the lower row.
__device__ inline uint64_t KeyOf(float score, int64_t row) {
  const uint32_t bits = FloatToBits(score + 0.0f);  // -0 counts as 0
  const uint32_t ordered = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 24 | (0xFFFFFFu - static_cast<uint64_t>(row));
}

// The best of all threads. `of_warps` is shared memory with no other use.
__device__ inline Best BestOfBlock(Best best, Best (&of_warps)[kWarps]) {
  const auto over_lanes = [&] {
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
      const float score = ShuffleXor(best.score, mask);
      const int64_t row = ShuffleXor(best.row, mask);
      best = Better(best, {score, row});
    }
  };
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  over_lanes();
  if (lane == 0) of_warps[warp] = best;
  SyncThreads();
  best = of_warps[lane];
  over_lanes();
  return best;
}

// The largest score and its row. The row is -1 if a logit is not finite or no row is allowed.
__device__ inline Best FindBest(const TokenSelectionArguments& given, Memory& memory) {
  Best best = {kNone, given.rows};
  for (int64_t row = threadIdx.x; row < given.rows; row += kThreads) {
    const uint32_t exponent = FloatToBits(given.logits[blockIdx.x * given.rows + row]) & 0x7F800000u;
    const bool finite = exponent != 0x7F800000u;
    best = Better(best, finite ? Best{ScoreOf(given, row), row} : Best{INFINITY, -1});
  }
  best = BestOfBlock(best, memory.largest);
  if (best.row == given.rows) best.row = -1;
  return best;
}

struct Sampler {
  const TokenSelectionArguments& given;
  float largest;

  __device__ float weight(float score) const { return expf((score - largest) / given.temperature); }
  __device__ uint64_t mass(float score) const { return static_cast<uint64_t>(weight(score) * kMassUnit); }

  // A histogram of the rows whose keys begin with `prefix`: their masses by the key's next byte.
  __device__ void Count(uint64_t prefix, int shift, Memory& memory) const {
    for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kThreads) memory.masses[bin] = 0;
    SyncThreads();
    for (int64_t row = threadIdx.x; row < given.rows; row += kThreads) {
      const float score = ScoreOf(given, row);
      const uint64_t key = KeyOf(score, row);
      if (key >> (shift + 8) == prefix) AtomicAdd(&memory.masses[key >> shift & 0xFFu], mass(score));
    }
    SyncThreads();
  }

  __device__ uint64_t Total(Memory& memory) const {
    uint64_t total = 0;
    Count(0, kKeyBits - 8, memory);
    for (const uint64_t one : memory.masses) total += one;
    SyncThreads();  // before the next Count clears the bins
    return total;
  }

  // The row at which the masses, added up from the largest key down, reach `goal`.
  __device__ int64_t Reach(uint64_t goal, Memory& memory) const {
    uint64_t prefix = 0, before = 0;
    for (int shift = kKeyBits - 8; shift >= 0; shift -= 8) {
      Count(prefix, shift, memory);
      if (threadIdx.x < kBins / 8) {
        uint64_t sum = 0;
        for (int i = 0; i < 8; ++i) sum += memory.masses[threadIdx.x * 8 + i];
        memory.sums[threadIdx.x] = sum;
      }
      SyncThreads();
      if (threadIdx.x == 0) {
        int group = kBins / 8 - 1;
        for (; group > 0 && before + memory.sums[group] < goal; --group) before += memory.sums[group];
        int bin = 8 * group + 7;
        for (; bin > 8 * group && before + memory.masses[bin] < goal; --bin) before += memory.masses[bin];
        memory.before = before;
        memory.prefix = prefix << 8 | static_cast<uint64_t>(bin);
      }
      SyncThreads();
      before = memory.before;
      prefix = memory.prefix;
    }
    return static_cast<int64_t>(0xFFFFFFu - (prefix & 0xFFFFFFu));
  }

  // The smallest key that belongs to top_p.
  __device__ uint64_t LeastKey(Memory& memory) const {
    if (given.top_p == 1) return 0;
    const uint64_t total = Total(memory);
    const auto top = static_cast<uint64_t>(ceil(static_cast<double>(given.top_p) * static_cast<double>(total)));
    const int64_t last = Reach(top < 1 ? 1 : top > total ? total : top, memory);
    return KeyOf(ScoreOf(given, last), last);
  }

  __device__ int64_t Draw(const float* times, Memory& memory) const {
    const uint64_t least = LeastKey(memory);
    Best best = {kNone, given.rows};
    for (int64_t row = threadIdx.x; row < given.rows; row += kThreads) {
      const float score = ScoreOf(given, row);
      if (KeyOf(score, row) >= least) best = Better(best, {weight(score) / times[row], row});
    }
    return BestOfBlock(best, memory.winners).row;
  }
};

__global__ void __launch_bounds__(kThreads, 1) TokenSelectionKernel(TokenSelectionArguments given) {
  auto& memory = Shared<Memory>();
  WaitForPrevious();
  AllowNext();
  const int64_t sequence = blockIdx.x, step = given.step[sequence];
  if (step >= given.steps) return;
  const Best best = FindBest(given, memory);
  int64_t row = best.row;
  if (given.temperature > 0 && row >= 0) {
    row = Sampler{given, best.score}.Draw(given.times + (step * given.batch + sequence) * given.rows, memory);
  }
  if (threadIdx.x != 0) return;  // the others read `step` and `seen` before the barriers above
  const int64_t id = row < 0 ? -1 : row + given.first_id;
  given.ids[step * given.batch + sequence] = id;
  given.token[sequence] = id;
  given.step[sequence] = step + 1;
  if (given.past_length != nullptr) given.past_length[sequence] += 1;
  if (given.seen != nullptr && row >= 0) given.seen[sequence * given.rows + row] = 1;
}

}  // namespace

Status TokenSelection(const TokenSelectionArguments& given, Stream stream) {
  if (given.batch < 1) return "[token_selection] there must be sequences";
  if (given.rows < 1 || given.rows > 1 << 24) return "[token_selection] rows must be 1 to 2^24";
  if (!(given.temperature >= 0) || !(given.top_p > 0) || given.top_p > 1) {
    return "[token_selection] temperature must be 0 or more, top_p above 0 and at most 1";
  }
  if (given.temperature > 0 && given.times == nullptr) return "[token_selection] sampling needs random times";
  if (!(given.penalty > 0)) return "[token_selection] the penalty must be above 0";
  if (given.penalty != 1 && given.seen == nullptr) return "[token_selection] a penalty needs the ids seen before";
  if (given.step == nullptr || given.ids == nullptr || given.token == nullptr || given.logits == nullptr) {
    return "[token_selection] logits, step, ids and token must be given";
  }
  return Launch(TokenSelectionKernel, Grid{given.batch}, dim3(kThreads), stream, given);
}

}  // namespace healthgpt::cuda
