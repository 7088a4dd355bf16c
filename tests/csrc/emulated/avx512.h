// AVX-512 for processors with no more than AVX2, for tests: by SIMDe, and below what SIMDe 0.7.4 lacks.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#define SIMD_IN_MEMORY  // no register of AVX2 holds such a vector
#include "simd/unroll.h"

namespace healthgpt {
namespace {

// All of these are found before the compiler's own, which are in no namespace.

SIMD_INLINE __m512 _mm512_cvtepi32_ps(__m512i a) {
  return __builtin_convertvector(reinterpret_cast<__v16si>(a), __v16sf);
}
SIMD_INLINE __m512i _mm512_cvtepi8_epi32(__m128i a) {
  return reinterpret_cast<__m512i>(__builtin_convertvector(reinterpret_cast<__v16qs>(a), __v16si));
}
SIMD_INLINE __m512i _mm512_cvtepu16_epi32(__m256i a) {
  return reinterpret_cast<__m512i>(__builtin_convertvector(reinterpret_cast<__v16hu>(a), __v16si));
}
SIMD_INLINE __m512i _mm512_srai_epi32(__m512i a, unsigned count) {
  return reinterpret_cast<__m512i>(reinterpret_cast<__v16si>(a) >> static_cast<int>(count));
}

// Half by half, where there is such an instruction for 256 bits.
SIMD_INLINE __m512i _mm512_cvtps_epi32(__m512 a) {
  const simde__m512_private from = simde__m512_to_private(a);
  simde__m512i_private to;
  for (int half = 0; half < 2; ++half) to.m256i[half] = _mm256_cvtps_epi32(from.m256[half]);
  return simde__m512i_from_private(to);
}
SIMD_INLINE __m512 _mm512_cvtph_ps(__m256i a) {
  simde__m512_private to;
  to.m256[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(a));
  to.m256[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1));
  return simde__m512_from_private(to);
}
SIMD_INLINE __m256i _mm512_cvtps_ph(__m512 a, int) {
  const simde__m512_private from = simde__m512_to_private(a);
  return _mm256_set_m128i(_mm256_cvtps_ph(from.m256[1], _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(from.m256[0], _MM_FROUND_TO_NEAREST_INT));
}

// The upper half on the lower one, until one lane is left.
template <class Function>
SIMD_INLINE float Reduce(__m512 a, const Function& function) {
  simde__m512_private lanes = simde__m512_to_private(a);
  for (int count = 8; count > 0; count /= 2) {
    for (int i = 0; i < count; ++i) lanes.f32[i] = function(lanes.f32[count + i], lanes.f32[i]);
  }
  return lanes.f32[0];
}
SIMD_INLINE float _mm512_reduce_add_ps(__m512 a) {
  return Reduce(a, [](float high, float low) { return high + low; });
}
SIMD_INLINE float _mm512_reduce_max_ps(__m512 a) {
  return Reduce(a, [](float high, float low) { return high > low ? high : low; });
}

// What the mask leaves out is not touched: it may lie outside of what may be read or written.
template <class Number, class Vector>
SIMD_INLINE Vector LoadMasked(uint64_t mask, const void* from) {
  constexpr int count = sizeof(Vector) / sizeof(Number);
  Number numbers[count] = {};
  for (int i = 0; i < count; ++i) {
    if ((mask >> i & 1) != 0) __builtin_memcpy(numbers + i, static_cast<const Number*>(from) + i, sizeof(Number));
  }
  Vector vector;
  __builtin_memcpy(&vector, numbers, sizeof(vector));
  return vector;
}
SIMD_INLINE __m512i _mm512_maskz_loadu_epi8(__mmask64 mask, const void* from) {
  return LoadMasked<uint8_t, __m512i>(mask, from);
}
SIMD_INLINE __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* from) {
  return LoadMasked<uint16_t, __m256i>(mask, from);
}
SIMD_INLINE __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* from) {
  return LoadMasked<float, __m512>(mask, from);
}
SIMD_INLINE void _mm512_mask_storeu_ps(float* to, __mmask16 mask, __m512 a) {
  const simde__m512_private from = simde__m512_to_private(a);
  for (int i = 0; i < 16; ++i) {
    if ((mask >> i & 1) != 0) to[i] = from.f32[i];
  }
}

}  // namespace
}  // namespace healthgpt

#include "amx.h"
#include "simd/avx512.h"
