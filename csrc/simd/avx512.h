// The vector operations of the kernels in AVX-512 with VNNI. simd/portable.h says what each must do.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "simd/unroll.h"
#include "target.h"

namespace healthgpt {
namespace {

struct Simd {
  static constexpr int kLanes = 16;
  static constexpr int kRegisters = 32;
  static constexpr bool kInRegisters = true;
#if defined(__AMX_INT8__)
  static constexpr bool kHasTiles = true;
#else
  static constexpr bool kHasTiles = false;
#endif
  using Bytes = __m512i;
  using Ints = __m512i;
  using Floats = __m512;

  // On a Zen 5 the L1 cache is the better place by a tenth of a row's time, on a Xeon the L2 cache by a twentieth of a
  // linear's.
  static bool PrefetchesNear() { return __builtin_cpu_is("amd"); }

  // --- bytes and dot products ---
  // VPDPBUSD multiplies unsigned by signed bytes: weights are shifted to be unsigned.
  static constexpr int kOffset4 = 8;
  static constexpr int kOffset8 = 128;
  static constexpr int kJoinedOffset4 = 136;
  static constexpr int kUpperOffset4 = 128;
  static constexpr int kPairsPerSum4 = 1;

  static SIMD_INLINE Bytes LoadBytes(const void* from) { return _mm512_loadu_si512(from); }
  static SIMD_INLINE Bytes LoadBytes(const void* from, int count) {
    return _mm512_maskz_loadu_epi8(count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1, from);
  }
  static SIMD_INLINE void StoreBytes(void* to, Bytes bytes) { _mm512_storeu_si512(to, bytes); }
  static SIMD_INLINE Bytes NoBytes() { return _mm512_setzero_si512(); }

  template <int kHalf>
  static SIMD_INLINE void InterleaveHalf(Bytes a, Bytes b, Bytes c, Bytes d, Bytes (&to)[2]) {
    const Bytes ab = kHalf == 0 ? _mm512_unpacklo_epi8(a, b) : _mm512_unpackhi_epi8(a, b);
    const Bytes cd = kHalf == 0 ? _mm512_unpacklo_epi8(c, d) : _mm512_unpackhi_epi8(c, d);
    to[0] = _mm512_unpacklo_epi16(ab, cd);
    to[1] = _mm512_unpackhi_epi16(ab, cd);
  }
  static SIMD_INLINE void Interleave(Bytes (&rows)[4]) {
    Bytes low[2], high[2];
    InterleaveHalf<0>(rows[0], rows[1], rows[2], rows[3], low);
    InterleaveHalf<1>(rows[0], rows[1], rows[2], rows[3], high);
    rows[0] = low[0];
    rows[1] = low[1];
    rows[2] = high[0];
    rows[3] = high[1];
  }
  static SIMD_INLINE Bytes Shift4(Bytes nibbles) {
    return _mm512_xor_si512(nibbles, _mm512_set1_epi8(static_cast<char>(0x88)));
  }
  static SIMD_INLINE Bytes Shift8(Bytes bytes) {
    return _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  static SIMD_INLINE Bytes EvenNibbles(Bytes shifted) { return _mm512_and_si512(shifted, _mm512_set1_epi8(0x0F)); }
  static SIMD_INLINE Bytes OddNibbles(Bytes shifted) {
    return _mm512_and_si512(_mm512_srli_epi16(shifted, 4), _mm512_set1_epi8(0x0F));
  }
  static SIMD_INLINE Bytes Join4(Bytes nibbles) { return Shift4(nibbles); }
  static SIMD_INLINE Bytes Upper4(Bytes joined) {
    return _mm512_and_si512(joined, _mm512_set1_epi8(static_cast<char>(0xF0)));
  }
  static SIMD_INLINE void Separate4(Ints& joined, Ints& upper) {
    joined = _mm512_sub_epi32(joined, upper);
    upper = _mm512_srai_epi32(upper, 4);
  }
  static SIMD_INLINE Bytes Repeat4(const int8_t* four) {
    int32_t bits;
    __builtin_memcpy(&bits, four, 4);
    return _mm512_set1_epi32(bits);
  }
  static SIMD_INLINE Ints Dot4(Ints sum, Bytes weights, Bytes x) { return _mm512_dpbusd_epi32(sum, weights, x); }
  static SIMD_INLINE Ints Dot8(Ints sum, Bytes weights, Bytes x) { return _mm512_dpbusd_epi32(sum, weights, x); }
  static SIMD_INLINE Ints AsInts(Bytes bytes) { return bytes; }
  static SIMD_INLINE Ints LoadInts(const int32_t* from) { return _mm512_loadu_si512(from); }
  static SIMD_INLINE void StoreInts(int32_t* to, Ints values) { _mm512_storeu_si512(to, values); }
  static SIMD_INLINE Ints RepeatInt(int32_t value) { return _mm512_set1_epi32(value); }

  static SIMD_INLINE void Order4(Ints (&sums)[8]) {
    Ints quads[8];
    Unroll<4>([&](auto i) SIMD_INLINE_LAMBDA {
      quads[2 * i] = _mm512_unpacklo_epi32(sums[2 * i], sums[2 * i + 1]);
      quads[2 * i + 1] = _mm512_unpackhi_epi32(sums[2 * i], sums[2 * i + 1]);
    });
    // Quad j of lane L holds columns 32 L + 4 j: columns 16 m are lane m / 2 of the first or the second four.
    Ints first[4] = {quads[0], quads[1], quads[2], quads[3]}, second[4] = {quads[4], quads[5], quads[6], quads[7]};
    TransposeLanes(first);
    TransposeLanes(second);
    Unroll<4>([&](auto i) SIMD_INLINE_LAMBDA {
      sums[2 * i] = first[i];
      sums[2 * i + 1] = second[i];
    });
  }
  static SIMD_INLINE void Order8(Ints (&sums)[8]) {
    Ints first[4] = {sums[0], sums[1], sums[2], sums[3]}, second[4] = {sums[4], sums[5], sums[6], sums[7]};
    TransposeLanes(first);
    TransposeLanes(second);
    Unroll<4>([&](auto i) SIMD_INLINE_LAMBDA {
      sums[i] = first[i];
      sums[4 + i] = second[i];
    });
  }
  static SIMD_INLINE void Disorder4(Ints (&sums)[8]) {
    Ints first[4] = {sums[0], sums[2], sums[4], sums[6]}, second[4] = {sums[1], sums[3], sums[5], sums[7]};
    TransposeLanes(first);
    TransposeLanes(second);
    const Ints quads[8] = {first[0], first[1], first[2], first[3], second[0], second[1], second[2], second[3]};
    Unroll<4>([&](auto i) SIMD_INLINE_LAMBDA {
      const __m512 low = _mm512_castsi512_ps(quads[2 * i]), high = _mm512_castsi512_ps(quads[2 * i + 1]);
      sums[2 * i] = _mm512_castps_si512(_mm512_shuffle_ps(low, high, 0x88));
      sums[2 * i + 1] = _mm512_castps_si512(_mm512_shuffle_ps(low, high, 0xDD));
    });
  }
  static SIMD_INLINE void Disorder8(Ints (&sums)[8]) { Order8(sums); }  // it is its own inverse

  // --- floats ---
  static SIMD_INLINE Floats ToFloats(Ints values) { return _mm512_cvtepi32_ps(values); }
  static SIMD_INLINE Ints FloatBits(Floats a) { return _mm512_castps_si512(a); }
  static SIMD_INLINE Floats FromBits(Ints bits) { return _mm512_castsi512_ps(bits); }
  static SIMD_INLINE Floats Load(const float* from) { return _mm512_loadu_ps(from); }
  static SIMD_INLINE Floats Load(const float* from, int count) {
    return count >= kLanes ? Load(from) : _mm512_maskz_loadu_ps(Mask(count), from);
  }
  static SIMD_INLINE void Store(float* to, Floats values) { _mm512_storeu_ps(to, values); }
  static SIMD_INLINE void Store(float* to, Floats values, int count) { _mm512_mask_storeu_ps(to, Mask(count), values); }
  static SIMD_INLINE Floats LoadHalf(const uint16_t* from, int count = kLanes) {
    return _mm512_cvtph_ps(LoadShorts(from, count));
  }
  static SIMD_INLINE Floats LoadBFloat16(const uint16_t* from, int count = kLanes) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(LoadShorts(from, count)), 16));
  }
  static SIMD_INLINE Floats LoadInt8(const int8_t* from) {
    return ToFloats(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  static SIMD_INLINE void StoreHalf(uint16_t* to, Floats values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
  }
  static SIMD_INLINE Floats Repeat(float value) { return _mm512_set1_ps(value); }
  static SIMD_INLINE Floats Add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static SIMD_INLINE Floats Multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static SIMD_INLINE Floats Divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static SIMD_INLINE Floats MultiplyAdd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static SIMD_INLINE Floats Max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static SIMD_INLINE Floats Magnitude(Floats a) { return _mm512_abs_ps(a); }
  static SIMD_INLINE Floats Round(Floats a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static SIMD_INLINE Floats PowerOfTwo(Floats whole) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), whole); }
  static SIMD_INLINE float Sum(Floats a) { return _mm512_reduce_add_ps(a); }
  static SIMD_INLINE Floats SumEach(const Floats (&rows)[16]) {
    Ints quarters[4];
    Unroll<4>([&](auto i) SIMD_INLINE_LAMBDA {
      const Floats low = AddPairs(rows[4 * i], rows[4 * i + 1]), high = AddPairs(rows[4 * i + 2], rows[4 * i + 3]);
      const __m512d a = _mm512_castps_pd(low), b = _mm512_castps_pd(high);
      quarters[i] = _mm512_castps_si512(
          _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b))));
    });
    TransposeLanes(quarters);
    return _mm512_add_ps(_mm512_add_ps(_mm512_castsi512_ps(quarters[0]), _mm512_castsi512_ps(quarters[1])),
                         _mm512_add_ps(_mm512_castsi512_ps(quarters[2]), _mm512_castsi512_ps(quarters[3])));
  }
  static SIMD_INLINE float Largest(Floats a) { return _mm512_reduce_max_ps(a); }
  static SIMD_INLINE void StoreRounded(int8_t* to, Floats values) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(values)));
  }

#if defined(__AMX_INT8__)
  // --- tiles, by AMX ---
  static bool AllowsTiles() { return AllowAmx(); }
  static void BeginTiles(int channels) {
    struct alignas(64) Shapes {
      uint8_t palette, start, reserved[14];
      uint16_t bytes[16];  // of a row of each tile
      uint8_t rows[16];
    };
    // Two tiles of sums, one of x, two of weights.
    const auto of_x = static_cast<uint16_t>(channels);
    const auto of_weights = static_cast<uint8_t>(channels / 4);
    const Shapes shapes = {1, 0, {}, {64, 64, of_x, 64, 64}, {16, 16, 16, of_weights, of_weights}};
    InMemory();
    _tile_loadconfig(&shapes);
  }
  static void EndTiles() { _tile_release(); }
  static void MultiplyTiles(const int8_t* x, int64_t x_stride, const uint8_t* weights, int64_t stride, int64_t channels,
                            int at_once, int32_t* sums) {
    InMemory();
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t channel = 0; channel < channels; channel += at_once) {
      const uint8_t* from = weights + channel / 4 * stride;
      _tile_loadd(2, x + channel, x_stride);
      _tile_loadd(3, from, stride);
      _tile_dpbsud(0, 2, 3);
      _tile_loadd(4, from + 64, stride);
      _tile_dpbsud(1, 2, 4);
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    InMemory();
  }
  static SIMD_INLINE Ints AddInts(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
#endif

 private:
#if defined(__AMX_INT8__)
  // The compiler does not know what memory the instructions for tiles read and write.
  static SIMD_INLINE void InMemory() { asm volatile("" ::: "memory"); }
#endif

  static SIMD_INLINE __m256i LoadShorts(const uint16_t* from, int count) {
    return count >= kLanes ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                           : _mm256_maskz_loadu_epi16(Mask(count), from);
  }

  static __mmask16 Mask(int count) { return static_cast<__mmask16>(count >= 16 ? 0xFFFF : (1u << count) - 1); }

  // Within each lane a0 + a2, b0 + b2, a1 + a3, b1 + b3.
  static SIMD_INLINE Floats AddPairs(Floats a, Floats b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }

  // A 4x4 transpose of 128-bit lanes.
  static SIMD_INLINE void TransposeLanes(Ints (&rows)[4]) {
    const Ints low01 = _mm512_shuffle_i32x4(rows[0], rows[1], 0x44),
               high01 = _mm512_shuffle_i32x4(rows[0], rows[1], 0xEE);
    const Ints low23 = _mm512_shuffle_i32x4(rows[2], rows[3], 0x44),
               high23 = _mm512_shuffle_i32x4(rows[2], rows[3], 0xEE);
    rows[0] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    rows[1] = _mm512_shuffle_i32x4(low01, low23, 0xDD);
    rows[2] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    rows[3] = _mm512_shuffle_i32x4(high01, high23, 0xDD);
  }
};

}  // namespace
}  // namespace healthgpt
