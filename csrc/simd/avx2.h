// The vector operations of the kernels in AVX2 with FMA and F16C, and AVX-VNNI where the compiler is told of it.
// simd/portable.h says what each must do.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "simd/unroll.h"

namespace healthgpt {
namespace {

struct Simd {
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 16;
  static constexpr bool kInRegisters = true;
  static constexpr bool kHasTiles = false;
  using Bytes = __m256i;
  using Ints = __m256i;
  using Floats = __m256;

  static bool PrefetchesNear() { return false; }

  // --- bytes and dot products ---
  // Unsigned times signed bytes is all there is. VPDPBUSD takes any weights shifted to be unsigned. VPMADDUBSW adds
  // pairs in 16 bits, where shifted 8-bit weights would not fit: those stay signed, and give their sign to x instead.
  static constexpr int kOffset4 = 8;
#ifdef __AVXVNNI__
  static constexpr int kOffset8 = 128;
  static constexpr int kPairsPerSum4 = 1;
#else
  static constexpr int kOffset8 = 0;
  static constexpr int kPairsPerSum4 = 8;  // 8 * 2 * 15 * 127 is below 2^15
#endif

  static SIMD_INLINE Bytes LoadBytes(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static SIMD_INLINE Bytes LoadBytes(const void* from, int count) {
    alignas(32) uint8_t bytes[32] = {};
    for (int i = 0; i < 32 && i < count; ++i) bytes[i] = static_cast<const uint8_t*>(from)[i];
    return LoadBytes(bytes);
  }
  static SIMD_INLINE void StoreBytes(void* to, Bytes bytes) { _mm256_storeu_si256(static_cast<__m256i*>(to), bytes); }
  static SIMD_INLINE Bytes NoBytes() { return _mm256_setzero_si256(); }

  static SIMD_INLINE void Interleave(Bytes (&rows)[4]) {
    const Bytes low01 = _mm256_unpacklo_epi8(rows[0], rows[1]), high01 = _mm256_unpackhi_epi8(rows[0], rows[1]);
    const Bytes low23 = _mm256_unpacklo_epi8(rows[2], rows[3]), high23 = _mm256_unpackhi_epi8(rows[2], rows[3]);
    rows[0] = _mm256_unpacklo_epi16(low01, low23);
    rows[1] = _mm256_unpackhi_epi16(low01, low23);
    rows[2] = _mm256_unpacklo_epi16(high01, high23);
    rows[3] = _mm256_unpackhi_epi16(high01, high23);
  }
  static SIMD_INLINE Bytes Shift4(Bytes nibbles) {
    return _mm256_xor_si256(nibbles, _mm256_set1_epi8(static_cast<char>(0x88)));
  }
  static SIMD_INLINE Bytes Shift8(Bytes bytes) {
    return kOffset8 == 0 ? bytes : _mm256_xor_si256(bytes, _mm256_set1_epi8(static_cast<char>(0x80)));
  }
  static SIMD_INLINE Bytes EvenNibbles(Bytes shifted) { return _mm256_and_si256(shifted, _mm256_set1_epi8(0x0F)); }
  static SIMD_INLINE Bytes OddNibbles(Bytes shifted) {
    return _mm256_and_si256(_mm256_srli_epi16(shifted, 4), _mm256_set1_epi8(0x0F));
  }
  static SIMD_INLINE Bytes Repeat4(const int8_t* four) {
    int32_t bits;
    __builtin_memcpy(&bits, four, 4);
    return _mm256_set1_epi32(bits);
  }
#ifdef __AVXVNNI__
  static SIMD_INLINE Ints Dot4(Ints sum, Bytes weights, Bytes x) { return _mm256_dpbusd_avx_epi32(sum, weights, x); }
  static SIMD_INLINE Ints Dot8(Ints sum, Bytes weights, Bytes x) { return _mm256_dpbusd_avx_epi32(sum, weights, x); }
#else
  static SIMD_INLINE Ints Pairs4(Bytes weights, Bytes x) { return _mm256_maddubs_epi16(weights, x); }
  static SIMD_INLINE Ints AddPairs(Ints a, Ints b) { return _mm256_add_epi16(a, b); }
  // sum + each two neighbouring sums of pairs times theirs of `factors`.
  static SIMD_INLINE Ints AddTimes(Ints sum, Ints pairs, Bytes factors) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, factors));
  }
  static SIMD_INLINE Ints AddWidened(Ints sum, Ints pairs) { return AddTimes(sum, pairs, _mm256_set1_epi16(1)); }
  static SIMD_INLINE Ints Dot4(Ints sum, Bytes weights, Bytes x) {
    return AddWidened(sum, _mm256_maddubs_epi16(weights, x));
  }
  static SIMD_INLINE Ints Dot8(Ints sum, Bytes weights, Bytes x) {
    return Dot4(sum, _mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));  // pairs are at most 2 * 128 * 127
  }
#endif
  static SIMD_INLINE Ints AsInts(Bytes bytes) { return bytes; }
  static SIMD_INLINE Ints LoadInts(const int32_t* from) { return LoadBytes(from); }
  static SIMD_INLINE void StoreInts(int32_t* to, Ints values) { StoreBytes(to, values); }
  static SIMD_INLINE Ints RepeatInt(int32_t value) { return _mm256_set1_epi32(value); }

  static SIMD_INLINE void Order4(Ints (&sums)[8]) {
    Ints quads[8];
    Unroll<4>([&](auto i) SIMD_INLINE_LAMBDA {
      quads[2 * i] = _mm256_unpacklo_epi32(sums[2 * i], sums[2 * i + 1]);
      quads[2 * i + 1] = _mm256_unpackhi_epi32(sums[2 * i], sums[2 * i + 1]);
    });
    // Quad j of lane L holds columns 32 L + 4 j.
    Unroll<4>([&](auto i) SIMD_INLINE_LAMBDA {
      sums[i] = _mm256_permute2x128_si256(quads[2 * i], quads[2 * i + 1], 0x20);
      sums[4 + i] = _mm256_permute2x128_si256(quads[2 * i], quads[2 * i + 1], 0x31);
    });
  }
  static SIMD_INLINE void Order8(Ints (&sums)[8]) {
    Unroll<2>([&](auto part) SIMD_INLINE_LAMBDA {
      constexpr int half = decltype(part)::value * 4;
      const Ints a = sums[half], b = sums[half + 1], c = sums[half + 2], d = sums[half + 3];
      sums[half] = _mm256_permute2x128_si256(a, b, 0x20);
      sums[half + 1] = _mm256_permute2x128_si256(c, d, 0x20);
      sums[half + 2] = _mm256_permute2x128_si256(a, b, 0x31);
      sums[half + 3] = _mm256_permute2x128_si256(c, d, 0x31);
    });
  }

  // --- floats ---
  static SIMD_INLINE Floats ToFloats(Ints values) { return _mm256_cvtepi32_ps(values); }
  static SIMD_INLINE Floats Load(const float* from) { return _mm256_loadu_ps(from); }
  static SIMD_INLINE Floats Load(const float* from, int count) {
    return count >= kLanes ? Load(from) : _mm256_maskload_ps(from, Mask(count));
  }
  static SIMD_INLINE void Store(float* to, Floats values) { _mm256_storeu_ps(to, values); }
  static SIMD_INLINE void Store(float* to, Floats values, int count) {
    if (count >= kLanes) return Store(to, values);  // AMD takes a dozen cycles for a store by a mask
    _mm256_maskstore_ps(to, Mask(count), values);
  }
  static SIMD_INLINE Floats LoadHalf(const uint16_t* from, int count = kLanes) {
    return _mm256_cvtph_ps(LoadShorts(from, count));
  }
  static SIMD_INLINE Floats LoadBFloat16(const uint16_t* from, int count = kLanes) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(LoadShorts(from, count)), 16));
  }
  static SIMD_INLINE Floats LoadInt8(const int8_t* from) {
    return ToFloats(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }
  static SIMD_INLINE void StoreHalf(uint16_t* to, Floats values) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
  }
  static SIMD_INLINE Floats Repeat(float value) { return _mm256_set1_ps(value); }
  static SIMD_INLINE Floats Add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static SIMD_INLINE Floats Multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static SIMD_INLINE Floats Divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
  static SIMD_INLINE Floats MultiplyAdd(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static SIMD_INLINE Floats Max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
  static SIMD_INLINE Floats Magnitude(Floats a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static SIMD_INLINE Floats Round(Floats a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static SIMD_INLINE Floats PowerOfTwo(Floats whole) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  }
  static SIMD_INLINE float Sum(Floats a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  static SIMD_INLINE Floats SumEach(const Floats (&rows)[8]) {
    Floats halves[2];
    Unroll<2>([&](auto i) SIMD_INLINE_LAMBDA {
      const Floats low = AddPairs(rows[4 * i], rows[4 * i + 1]), high = AddPairs(rows[4 * i + 2], rows[4 * i + 3]);
      const __m256d a = _mm256_castps_pd(low), b = _mm256_castps_pd(high);
      halves[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
    });
    return _mm256_add_ps(_mm256_permute2f128_ps(halves[0], halves[1], 0x20),
                         _mm256_permute2f128_ps(halves[0], halves[1], 0x31));
  }
  static SIMD_INLINE float Largest(Floats a) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  static SIMD_INLINE void StoreRounded(int8_t* to, Floats values) {
    const __m256i ints = _mm256_cvtps_epi32(values);
    const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(shorts, shorts));
  }

 private:
  // Within each lane a0 + a2, b0 + b2, a1 + a3, b1 + b3.
  static SIMD_INLINE Floats AddPairs(Floats a, Floats b) {
    return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  }

  static SIMD_INLINE __m128i LoadShorts(const uint16_t* from, int count) {
    if (count >= kLanes) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    alignas(16) uint16_t shorts[8] = {};
    for (int i = 0; i < count; ++i) shorts[i] = from[i];
    return _mm_load_si128(reinterpret_cast<const __m128i*>(shorts));
  }

  static __m256i Mask(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};

}  // namespace
}  // namespace healthgpt
