// The vector operations of the kernels in NEON with the dot product extension of ARMv8.2.
// simd/portable.h says what each must do.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace healthgpt {
namespace {

struct Simd {
  static constexpr int kLanes = 4;
  static constexpr int kRegisters = 32;
  static constexpr bool kInRegisters = true;
  static constexpr bool kHasTiles = false;
  using Bytes = uint8x16_t;
  using Ints = int32x4_t;
  using Floats = float32x4_t;

  static bool PrefetchesNear() { return false; }

  // --- bytes and dot products ---
  static constexpr int kOffset4 = 0;
  static constexpr int kOffset8 = 0;
  static constexpr int kJoinedOffset4 = 8;
  static constexpr int kUpperOffset4 = 0;
  static constexpr int kPairsPerSum4 = 1;

  static Bytes LoadBytes(const void* from) { return vld1q_u8(static_cast<const uint8_t*>(from)); }
  static Bytes LoadBytes(const void* from, int count) {
    uint8_t bytes[16] = {};
    for (int i = 0; i < 16 && i < count; ++i) bytes[i] = static_cast<const uint8_t*>(from)[i];
    return vld1q_u8(bytes);
  }
  static void StoreBytes(void* to, Bytes bytes) { vst1q_u8(static_cast<uint8_t*>(to), bytes); }
  static Bytes NoBytes() { return vdupq_n_u8(0); }

  template <int kHalf>
  static void InterleaveHalf(Bytes a, Bytes b, Bytes c, Bytes d, Bytes (&to)[2]) {
    const uint16x8_t ab = vreinterpretq_u16_u8(kHalf == 0 ? vzip1q_u8(a, b) : vzip2q_u8(a, b));
    const uint16x8_t cd = vreinterpretq_u16_u8(kHalf == 0 ? vzip1q_u8(c, d) : vzip2q_u8(c, d));
    to[0] = vreinterpretq_u8_u16(vzip1q_u16(ab, cd));
    to[1] = vreinterpretq_u8_u16(vzip2q_u16(ab, cd));
  }
  static void Interleave(Bytes (&rows)[4]) {
    Bytes low[2], high[2];
    InterleaveHalf<0>(rows[0], rows[1], rows[2], rows[3], low);
    InterleaveHalf<1>(rows[0], rows[1], rows[2], rows[3], high);
    rows[0] = low[0];
    rows[1] = low[1];
    rows[2] = high[0];
    rows[3] = high[1];
  }
  static Bytes Shift4(Bytes nibbles) { return nibbles; }
  static Bytes Shift8(Bytes bytes) { return bytes; }
  static Bytes EvenNibbles(Bytes shifted) {
    return vreinterpretq_u8_s8(vshrq_n_s8(vreinterpretq_s8_u8(vshlq_n_u8(shifted, 4)), 4));
  }
  static Bytes OddNibbles(Bytes shifted) { return vreinterpretq_u8_s8(vshrq_n_s8(vreinterpretq_s8_u8(shifted), 4)); }
  static Bytes Join4(Bytes nibbles) { return veorq_u8(nibbles, vdupq_n_u8(0x08)); }
  static Bytes Upper4(Bytes joined) { return vandq_u8(joined, vdupq_n_u8(0xF0)); }
  static void Separate4(Ints& joined, Ints& upper) {
    joined = vsubq_s32(joined, upper);
    upper = vshrq_n_s32(upper, 4);
  }
  static Bytes Repeat4(const int8_t* four) {
    uint32_t bits;
    __builtin_memcpy(&bits, four, 4);
    return vreinterpretq_u8_u32(vdupq_n_u32(bits));
  }
  static Ints Dot4(Ints sum, Bytes weights, Bytes x) { return Dot8(sum, weights, x); }
  static Ints Dot8(Ints sum, Bytes weights, Bytes x) {
    return vdotq_s32(sum, vreinterpretq_s8_u8(weights), vreinterpretq_s8_u8(x));
  }
  static Ints AsInts(Bytes bytes) { return vreinterpretq_s32_u8(bytes); }
  static Ints LoadInts(const int32_t* from) { return vld1q_s32(from); }
  static void StoreInts(int32_t* to, Ints values) { vst1q_s32(to, values); }
  static Ints RepeatInt(int32_t value) { return vdupq_n_s32(value); }

  static void Order4(Ints (&sums)[8]) {
    for (int i = 0; i < 8; i += 2) {
      const Ints even = sums[i], odd = sums[i + 1];
      sums[i] = vzip1q_s32(even, odd);
      sums[i + 1] = vzip2q_s32(even, odd);
    }
  }
  static void Order8(Ints (&)[8]) {}
  static void Disorder4(Ints (&sums)[8]) {
    for (int i = 0; i < 8; i += 2) {
      const Ints first = sums[i], second = sums[i + 1];
      sums[i] = vuzp1q_s32(first, second);
      sums[i + 1] = vuzp2q_s32(first, second);
    }
  }
  static void Disorder8(Ints (&)[8]) {}

  // --- floats ---
  static Floats ToFloats(Ints values) { return vcvtq_f32_s32(values); }
  static Ints FloatBits(Floats a) { return vreinterpretq_s32_f32(a); }
  static Floats FromBits(Ints bits) { return vreinterpretq_f32_s32(bits); }
  static Floats Load(const float* from) { return vld1q_f32(from); }
  static Floats Load(const float* from, int count) {
    if (count >= kLanes) return Load(from);
    float values[4] = {};
    for (int i = 0; i < count; ++i) values[i] = from[i];
    return vld1q_f32(values);
  }
  static void Store(float* to, Floats values) { vst1q_f32(to, values); }
  static void Store(float* to, Floats values, int count) {
    float stored[4];
    vst1q_f32(stored, values);
    for (int i = 0; i < 4 && i < count; ++i) to[i] = stored[i];
  }
  static Floats LoadHalf(const uint16_t* from, int count = kLanes) {
    return vcvt_f32_f16(vreinterpret_f16_u16(LoadShorts(from, count)));
  }
  static Floats LoadBFloat16(const uint16_t* from, int count = kLanes) {
    return vreinterpretq_f32_u32(vshll_n_u16(LoadShorts(from, count), 16));
  }
  static Floats LoadInt8(const int8_t* from) {
    int32_t bits;
    __builtin_memcpy(&bits, from, 4);
    const int8x8_t bytes = vreinterpret_s8_s32(vdup_n_s32(bits));
    return ToFloats(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
  }
  static void StoreHalf(uint16_t* to, Floats values) { vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(values))); }
  static Floats Repeat(float value) { return vdupq_n_f32(value); }
  static Floats Add(Floats a, Floats b) { return vaddq_f32(a, b); }
  static Floats Multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
  static Floats Divide(Floats a, Floats b) { return vdivq_f32(a, b); }
  static Floats MultiplyAdd(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
  static Floats Max(Floats a, Floats b) { return vmaxq_f32(a, b); }
  static Floats Magnitude(Floats a) { return vabsq_f32(a); }
  static Floats Round(Floats a) { return vrndnq_f32(a); }
  static Floats PowerOfTwo(Floats whole) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(whole), vdupq_n_s32(127)), 23));
  }
  static float Sum(Floats a) { return vaddvq_f32(a); }
  static Floats SumEach(const Floats (&rows)[4]) {
    return vpaddq_f32(vpaddq_f32(rows[0], rows[1]), vpaddq_f32(rows[2], rows[3]));
  }
  static float Largest(Floats a) { return vmaxvq_f32(a); }
  static void StoreRounded(int8_t* to, Floats values) {
    const int16x4_t shorts = vqmovn_s32(vcvtnq_s32_f32(values));
    const int8x8_t bytes = vqmovn_s16(vcombine_s16(shorts, shorts));
    vst1_lane_s32(reinterpret_cast<int32_t*>(to), vreinterpret_s32_s8(bytes), 0);
  }

 private:
  static uint16x4_t LoadShorts(const uint16_t* from, int count) {
    if (count >= kLanes) return vld1_u16(from);
    uint16_t shorts[4] = {};
    for (int i = 0; i < count; ++i) shorts[i] = from[i];
    return vld1_u16(shorts);
  }
};

}  // namespace
}  // namespace healthgpt
