// The loops of the ceilings, compiled once per target, like the kernels whose ceilings they are.
#include "ceilings/target_kernels.h"
#include "simd/simd.h"

namespace healthgpt {
namespace {

// Enough independent sums to hide the latency of an instruction that starts twice a cycle.
constexpr int kSums = 12;
constexpr int kRounds = 20000;

double Int8(const void*, size_t) {
  Simd::Ints sums[kSums];
  const int8_t fours[] = {3, 3, 3, 3, -2, -2, -2, -2};
  const Simd::Bytes x = Simd::Repeat4(fours), weights = Simd::Repeat4(fours + 4);
  Unroll<kSums>([&](auto i) SIMD_INLINE_LAMBDA { sums[i] = Simd::RepeatInt(0); });
  for (int round = 0; round < kRounds; ++round) {
    Unroll<kSums>([&](auto i) SIMD_INLINE_LAMBDA {
      sums[i] = Simd::Dot8(sums[i], weights, x);
      SIMD_HOLD(sums[i]);
    });
  }
  return 2.0 * 4 * Simd::kLanes * kSums * kRounds;
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

double Read(const void* memory, size_t bytes) {
  constexpr int64_t kStep = 4 * Simd::kLanes;
  const char* from = static_cast<const char*>(memory);
  for (size_t at = 0; at + 4 * kStep <= bytes; at += 4 * kStep) {
    Unroll<4>([&](auto i) SIMD_INLINE_LAMBDA {
      Simd::Bytes read = Simd::LoadBytes(from + at + i * kStep);
      SIMD_HOLD(read);
    });
  }
  return static_cast<double>(bytes);
}

}  // namespace

CeilingLoops SIMD_KERNEL(Ceilings)() { return {Int8, Float32, Read}; }

}  // namespace healthgpt
