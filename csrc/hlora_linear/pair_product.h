// Products of bytes with 4-bit weights where there is no instruction that sums four of them in 32 bits, but one that
// sums two in 16 (AVX2 without VNNI). Sums of Target::kPairsPerSum4 such pairs fit in 16 bits, too, and are widened
// once.
//
// Weights of 8 bits are taken as 4-bit ones twice: w = 16 h + l - 128, with h and l from 0 to 15. That costs two
// products and two additions of each vector, no more than any other way: products of whole bytes fill 16 bits with the
// first pair, and would have to be widened each.
#pragma once

#include "hlora_linear/part.h"

namespace healthgpt {
namespace {

alignas(32) constexpr int16_t kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
alignas(32) constexpr int16_t kSixteens[16] = {16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16};
constexpr int kPairedOffset8 = 128;  // what h and l add to w

// l to `to`, h as many bytes behind it as a tile has.
template <class Target>
SIMD_INLINE void StoreNibbles(int32_t* to, int64_t tile_bytes, Ints weights) {
  Target::StoreInts(to, Target::EvenNibbles(weights));
  Target::StoreInts(to + tile_bytes / 4, Target::OddNibbles(Target::Shift4(weights)));
}

// sums (kRows, kSums vectors) += kCount times four channels of a tile, whose vectors for these sums begin at `weights`,
// times rows of x, times `factors`.
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
        SIMD_KEEP(pairs[r][i]);  // or GCC would add the products up later, and keep them until then
      });
    });
  });
  asm volatile("" : "+r"(factors));  // loaded anew each time: kept in a register they would drive a sum out of it
  const Bytes times = Target::LoadBytes(factors);
  Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
    Unroll<kSums>([&](auto i) SIMD_INLINE_LAMBDA { sums[r][i] = Target::AddTimes(sums[r][i], pairs[r][i], times); });
  });
}

// The same for `channels` channels. A function of its own, whose loop has all registers.
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
