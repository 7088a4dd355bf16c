#include "ceilings/ceilings.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

namespace healthgpt {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kWindows = 5;
constexpr double kWindowSeconds = 0.05;

// Sums what every thread does per second: unit(thread) does some work and returns how much, again and again for one
// window. The best window counts.
template <class Unit>
double BestRate(int threads, Unit unit) {
  double best = 0;
  for (int window = 0; window < kWindows; ++window) {
    std::vector<double> rates(static_cast<size_t>(threads));
    std::vector<std::thread> workers;
    for (int thread = 0; thread < threads; ++thread) {
      workers.emplace_back([&, thread] {
        const auto begin = Clock::now();
        double work = 0, seconds = 0;
        do {
          work += unit(thread);
          seconds = std::chrono::duration<double>(Clock::now() - begin).count();
        } while (seconds < kWindowSeconds);
        rates[static_cast<size_t>(thread)] = work / seconds;
      });
    }
    for (auto& worker : workers) worker.join();
    double sum = 0;
    for (const double rate : rates) sum += rate;
    best = std::max(best, sum);
  }
  return best;
}

// Keeps a result that nobody reads from being optimised away, and its loop with it.
template <class Value>
inline __attribute__((always_inline)) void Keep(const Value& value) {
  asm volatile("" : : "m"(value));
}

// --- reading ---------------------------------------------------------------------------------------------------------

// Many sums, so that loads never wait for an addition. Always inlined: vectorised for the caller's instruction set.
inline __attribute__((always_inline)) uint64_t Sum(const uint64_t* values, size_t count) {
  constexpr size_t kSums = 64;
  uint64_t sums[kSums] = {};
  for (size_t i = 0; i + kSums <= count; i += kSums) {
    for (size_t j = 0; j < kSums; ++j) sums[j] += values[i + j];
  }
  uint64_t total = 0;
  for (const uint64_t sum : sums) total += sum;
  return total;
}

uint64_t SumPortable(const uint64_t* values, size_t count) { return Sum(values, count); }

#if defined(__x86_64__)
__attribute__((target("avx2"))) uint64_t SumAvx2(const uint64_t* values, size_t count) { return Sum(values, count); }
__attribute__((target("avx512f"))) uint64_t SumAvx512(const uint64_t* values, size_t count) {
  return Sum(values, count);
}
#endif

using Summer = uint64_t (*)(const uint64_t*, size_t);

Summer BestSum() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return SumAvx512;
  if (__builtin_cpu_supports("avx2")) return SumAvx2;
#endif
  return SumPortable;
}

// --- arithmetic ------------------------------------------------------------------------------------------------------

// Enough independent accumulators to hide the latency of an instruction that starts twice a cycle.
constexpr int kAccumulators = 12;
constexpr int kRounds = 20000;

#if defined(__x86_64__)

// One multiplication and one addition for each of the bytes of a register.
__attribute__((target("avx512f,avx512vnni"))) double Int8Avx512() {
  __m512i sums[kAccumulators] = {};
  const __m512i x = _mm512_set1_epi8(3), w = _mm512_set1_epi8(-2);
  for (int round = 0; round < kRounds; ++round) {
#pragma GCC unroll 12
    for (__m512i& sum : sums) sum = _mm512_dpbusd_epi32(sum, x, w);
  }
  Keep(sums);
  return 2.0 * 64 * kAccumulators * kRounds;
}

__attribute__((target("avx512f"))) double Float32Avx512() {
  __m512 sums[kAccumulators] = {};
  const __m512 x = _mm512_set1_ps(0.5f), w = _mm512_set1_ps(0.25f);
  for (int round = 0; round < kRounds; ++round) {
#pragma GCC unroll 12
    for (__m512& sum : sums) sum = _mm512_fmadd_ps(sum, x, w);
  }
  Keep(sums);
  return 2.0 * 16 * kAccumulators * kRounds;
}

__attribute__((target("avx2,avxvnni"))) double Int8AvxVnni() {
  __m256i sums[kAccumulators] = {};
  const __m256i x = _mm256_set1_epi8(3), w = _mm256_set1_epi8(-2);
  for (int round = 0; round < kRounds; ++round) {
#pragma GCC unroll 12
    for (__m256i& sum : sums) sum = _mm256_dpbusd_avx_epi32(sum, x, w);
  }
  Keep(sums);
  return 2.0 * 32 * kAccumulators * kRounds;
}

__attribute__((target("avx2,fma"))) double Float32Avx2() {
  __m256 sums[kAccumulators] = {};
  const __m256 x = _mm256_set1_ps(0.5f), w = _mm256_set1_ps(0.25f);
  for (int round = 0; round < kRounds; ++round) {
#pragma GCC unroll 12
    for (__m256& sum : sums) sum = _mm256_fmadd_ps(sum, x, w);
  }
  Keep(sums);
  return 2.0 * 8 * kAccumulators * kRounds;
}

#elif defined(__aarch64__)

__attribute__((target("+dotprod"))) double Int8Neon() {
  int32x4_t sums[kAccumulators] = {};
  const int8x16_t x = vdupq_n_s8(3), w = vdupq_n_s8(-2);
  for (int round = 0; round < kRounds; ++round) {
#pragma GCC unroll 12
    for (int32x4_t& sum : sums) sum = vdotq_s32(sum, x, w);
  }
  Keep(sums);
  return 2.0 * 16 * kAccumulators * kRounds;
}

double Float32Neon() {
  float32x4_t sums[kAccumulators] = {};
  const float32x4_t x = vdupq_n_f32(0.5f), w = vdupq_n_f32(0.25f);
  for (int round = 0; round < kRounds; ++round) {
#pragma GCC unroll 12
    for (float32x4_t& sum : sums) sum = vfmaq_f32(w, sum, x);
  }
  Keep(sums);
  return 2.0 * 4 * kAccumulators * kRounds;
}

#endif

using Work = double (*)();

Work BestInt8() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512vnni")) return Int8Avx512;
  if (__builtin_cpu_supports("avxvnni")) return Int8AvxVnni;
#elif defined(__aarch64__) && defined(__linux__)
  if (getauxval(AT_HWCAP) & (1ul << 20)) return Int8Neon;  // HWCAP_ASIMDDP
#endif
  return nullptr;
}

Work BestFloat32() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return Float32Avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Float32Avx2;
  return nullptr;
#elif defined(__aarch64__)
  return Float32Neon;
#else
  return nullptr;
#endif
}

std::optional<double> Rate(int threads, Work work) {
  if (work == nullptr) return std::nullopt;
  return BestRate(threads, [work](int) { return work(); });
}

}  // namespace

double ReadBandwidth(int threads, int64_t bytes) {
  const size_t share = static_cast<size_t>(bytes) / sizeof(uint64_t) / static_cast<size_t>(threads);
  // Not std::vector: pages have to be touched first by the thread that reads them.
  const std::unique_ptr<uint64_t[]> buffer(new uint64_t[share * static_cast<size_t>(threads)]);
  const auto part = [&](int thread) { return buffer.get() + share * static_cast<size_t>(thread); };
  std::vector<std::thread> writers;
  for (int thread = 0; thread < threads; ++thread) {
    writers.emplace_back([&, thread] { std::memset(part(thread), 1, share * sizeof(uint64_t)); });
  }
  for (auto& writer : writers) writer.join();
  const Summer sum = BestSum();
  return BestRate(threads, [&](int thread) {
    Keep(sum(part(thread), share));
    return static_cast<double>(share * sizeof(uint64_t));
  });
}

std::optional<double> Int8Rate(int threads) { return Rate(threads, BestInt8()); }

std::optional<double> Float32Rate(int threads) { return Rate(threads, BestFloat32()); }

}  // namespace healthgpt
