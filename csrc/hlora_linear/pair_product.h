// Products of bytes with 4-bit weights on processors without an instruction that sums four products in 32 bits, but
// with one that sums two in 16 bits (AVX2 without VNNI). Sums of Target::kPairsPerSum4 such pairs still fit in 16 bits
// and are widened once.
//
// 8-bit weights are split into two 4-bit ones: w = 16 h + l - 128, with h and l from 0 to 15. That costs two products
// and two additions per vector, no more than other ways: a pair of products of whole bytes already fills 16 bits, so
// every pair would have to be widened.
#pragma once

#include "hlora_linear/part.h"

namespace healthgpt {
namespace {

alignas(32) constexpr int16_t kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
alignas(32) constexpr int16_t kSixteens[16] = {16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16};
constexpr int kPairedOffset8 = 128;  // 16 h + l - w

// Stores l at `to`, and h `tile_bytes` bytes after it.
template <class Target>
SIMD_INLINE void StoreNibbles(int32_t* to, int64_t tile_bytes, Ints weights) {
  Target::StoreInts(to, Target::EvenNibbles(weights));
  Target::StoreInts(to + tile_bytes / 4, Target::OddNibbles(Target::Shift4(weights)));
}

// sums (kRows, kSums vectors) += 4 kCount channels of a tile, whose vectors for these sums begin at `weights`, times
// rows of x, times `factors`.
template <class Target, int kRows, int kSums, int kCount>
SIMD_INLINE void AddGroup(const uint8_t* weights, const int8_t* x, int64_t x_stride, const int16_t* factors,
                          Ints (*sums)[kSums]) {
  Ints pairs[kRows][kSums];
  Unroll<kCount>([&](auto step) SIMD_INLINE_LAMBDA {
    Bytes loaded[kSums];
    Unroll<kSums>([&](auto i) SIMD_INLINE_LAMBDA {
      loaded[i] = Target::LoadBytes(weights + 4 * (step * kTile + i * Target::kLanes));
    });
    Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
      const Bytes bytes = Target::Repeat4(x + r * x_stride + 4 * step);
      Unroll<kSums>([&](auto i) SIMD_INLINE_LAMBDA {
        const Ints product = Target::Pairs4(loaded[i], bytes);
        pairs[r][i] = step == 0 ? product : Target::AddPairs(pairs[r][i], product);
        SIMD_KEEP(pairs[r][i]);  // otherwise GCC adds the products later and keeps all of them until then
      });
    });
  });
  asm volatile("" : "+r"(factors));  // forces a new load: in a register, the factors would displace a sum
  const Bytes times = Target::LoadBytes(factors);
  Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
    Unroll<kSums>([&](auto i) SIMD_INLINE_LAMBDA { sums[r][i] = Target::AddTimes(sums[r][i], pairs[r][i], times); });
  });
}

// The same for `channels` channels. Not inlined, so that its loop can use all registers.
template <class Target, int kRows, int kSums>
__attribute__((noinline)) void AddInPairs(const uint8_t* weights, const int8_t* x, int64_t x_stride, int64_t channels,
                                          const int16_t* factors, Ints (*sums)[kSums]) {
  constexpr int kMost = Target::kPairsPerSum4;
  for (; channels >= 4 * kMost; channels -= 4 * kMost, weights += 4 * kMost * kTile, x += 4 * kMost) {
    AddGroup<Target, kRows, kSums, kMost>(weights, x, x_stride, factors, sums);
  }
  for (; channels > 0; channels -= 4, weights += 4 * kTile, x += 4) {
    AddGroup<Target, kRows, kSums, 1>(weights, x, x_stride, factors, sums);
  }
}

}  // namespace
}  // namespace healthgpt
