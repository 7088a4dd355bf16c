// AVX-VNNI for processors with no more than AVX2, for tests: its one instruction in several of theirs.
#pragma once

#include <immintrin.h>

#include "simd/unroll.h"

namespace healthgpt {
namespace {

// Found before the compiler's own, which is in no namespace. Two products of bytes, widened to 16 bits, fit in 32.
SIMD_INLINE __m256i _mm256_dpbusd_avx_epi32(__m256i sum, __m256i a, __m256i b) {
  const __m256i even_a = _mm256_and_si256(a, _mm256_set1_epi16(0xFF)), odd_a = _mm256_srli_epi16(a, 8);
  const __m256i even_b = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8), odd_b = _mm256_srai_epi16(b, 8);
  const __m256i even = _mm256_madd_epi16(even_a, even_b), odd = _mm256_madd_epi16(odd_a, odd_b);
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}

}  // namespace
}  // namespace healthgpt

#define __AVXVNNI__ 1
#include "simd/avx2.h"
