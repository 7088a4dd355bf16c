// The loops of the ceilings, compiled once per target like the kernels that they are limits of.
#include "ceilings/target_kernels.h"
#include "simd/simd.h"

namespace healthgpt {
namespace {

// Enough independent sums to hide the latency of an instruction with a throughput of two per cycle.
constexpr int kSums = 12;
constexpr int kRounds = 20000;

// Products with 4-bit weights, which on every target are at least as fast as those with bytes. SIMD_HOLD hides the
// operands from the compiler, which would otherwise move the products out of the loop.
template <class Target>
double Int8(const void*, size_t) {
  constexpr bool kInPairs = Target::kPairsPerSum4 > 1;
  constexpr int kSumsHeld = kInPairs ? kSums / 2 : kSums;  // the sums of pairs also need registers
  const int8_t fours[] = {3, 3, 3, 3, -2, -2, -2, -2};
  Simd::Bytes weights = Simd::EvenNibbles(Simd::Repeat4(fours)), x = Simd::Repeat4(fours + 4);
  Simd::Ints sums[kSumsHeld], pairs[kSumsHeld];
  Unroll<kSumsHeld>([&](auto i) SIMD_INLINE_LAMBDA { sums[i] = Simd::RepeatInt(0); });
  for (int round = 0; round < kRounds; ++round) {
    Unroll<Target::kPairsPerSum4>([&](auto step) SIMD_INLINE_LAMBDA {
      Unroll<kSumsHeld>([&](auto i) SIMD_INLINE_LAMBDA {
        SIMD_HOLD(x);
        if constexpr (kInPairs) {
          const Simd::Ints product = Target::Pairs4(weights, x);
          pairs[i] = step == 0 ? product : Target::AddPairs(pairs[i], product);
          SIMD_HOLD(pairs[i]);
        } else {
          sums[i] = Target::Dot4(sums[i], weights, x);
          SIMD_HOLD(sums[i]);
        }
      });
    });
    if constexpr (kInPairs) {
      Unroll<kSumsHeld>([&](auto i) SIMD_INLINE_LAMBDA {
        sums[i] = Target::AddWidened(sums[i], pairs[i]);
        SIMD_HOLD(sums[i]);
      });
    }
  }
  return 2.0 * 4 * Simd::kLanes * kSumsHeld * Target::kPairsPerSum4 * kRounds;
}

double Float32(const void*, size_t) {
  Simd::Floats sums[kSums];
  const Simd::Floats x = Simd::Repeat(0.5f);
  Unroll<kSums>([&](auto i) SIMD_INLINE_LAMBDA { sums[i] = x; });
  for (int round = 0; round < kRounds; ++round) {
    Unroll<kSums>([&](auto i) SIMD_INLINE_LAMBDA {
      sums[i] = Simd::MultiplyAdd(sums[i], x, x);
      SIMD_HOLD(sums[i]);
    });
  }
  return 2.0 * Simd::kLanes * kSums * kRounds;
}

// Reads, and prefetches what lies kAhead bytes further on, unless that is 0. Which is faster depends on the machine.
template <int64_t kAhead>
double Read(const void* memory, size_t bytes) {
  constexpr int64_t kStep = 4 * Simd::kLanes;
  const char* from = static_cast<const char*>(memory);
  for (size_t at = 0; at + 4 * kStep <= bytes; at += 4 * kStep) {
    for (int64_t line = 0; kAhead > 0 && line < 4 * kStep; line += 64) __builtin_prefetch(from + at + kAhead + line);
    Unroll<4>([&](auto i) SIMD_INLINE_LAMBDA {
      Simd::Bytes read = Simd::LoadBytes(from + at + i * kStep);
      SIMD_HOLD(read);
    });
  }
  return static_cast<double>(bytes);
}

}  // namespace

CeilingLoops SIMD_KERNEL(Ceilings)() { return {Int8<Simd>, Float32, {Read<0>, Read<4096>}}; }

}  // namespace healthgpt
