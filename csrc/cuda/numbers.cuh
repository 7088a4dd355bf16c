// 16-bit numbers, and arithmetic on pairs of them in one register, with the same interface on the device and the host.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cstdint>
#include <cstring>

#include "cuda/platform.cuh"

namespace healthgpt::cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

#ifdef __CUDACC__

__device__ inline uint32_t FloatToBits(float value) { return __float_as_uint(value); }
__device__ inline float ToFloat(Half value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ inline float ToFloat(BFloat16 value) { return __bfloat162float(__ushort_as_bfloat16(value.bits)); }
__device__ inline Half Round(float value, Half) { return {__half_as_ushort(__float2half_rn(value))}; }
__device__ inline BFloat16 Round(float value, BFloat16) { return {__bfloat16_as_ushort(__float2bfloat16_rn(value))}; }
// Rounds two numbers to float16 and packs them into a word, `low` in the low bits: one instruction since Ampere.
__device__ inline uint32_t RoundHalves(float low, float high) {
  const __half2 halves = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &halves, sizeof bits);
  return bits;
}

__device__ inline uint32_t SubtractHalves(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
__device__ inline uint32_t MultiplyAddHalves(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}
// (a & b) ^ c in one instruction; the compiler would use two if b and c are constants.
__device__ inline uint32_t AndXor(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}
// Picks four of the eight bytes of a (0 to 3) and b (4 to 7) by the hexadecimal digits of `selector`, lowest first.
__device__ inline uint32_t Permute(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

#else

inline float BitsToFloat(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t FloatToBits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float ToFloat(BFloat16 value) { return BitsToFloat(static_cast<uint32_t>(value.bits) << 16); }
inline float ToFloat(Half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return BitsToFloat(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  if (magnitude < 0x0400u) {  // subnormal: whole multiples of 2^-24
    const float small = static_cast<float>(magnitude) * 0x1p-24f;
    return sign != 0 ? -small : small;
  }
  return BitsToFloat(sign | ((magnitude << 13) + 0x38000000u));
}

// To nearest, ties to even.
inline BFloat16 Round(float value, BFloat16) {
  const uint32_t bits = FloatToBits(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}
inline Half Round(float value, Half) {
  const uint32_t bits = FloatToBits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {0x7FFF};
  if (magnitude >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};  // from 65520 on
  if (magnitude < 0x38800000u) {
    // The last bit of a sum with 0.5 has the weight of a subnormal half's last bit, so the addition rounds correctly.
    const uint32_t sum = FloatToBits(BitsToFloat(magnitude) + 0.5f);
    return {static_cast<uint16_t>(sign | (sum - 0x3F000000u))};
  }
  const uint32_t rounded = magnitude + 0x0FFFu + (magnitude >> 13 & 1u) - 0x38000000u;
  return {static_cast<uint16_t>(sign | rounded >> 13)};
}

inline uint32_t RoundHalves(float low, float high) {
  return Round(low, Half()).bits | static_cast<uint32_t>(Round(high, Half()).bits) << 16;
}

// The kernels use these only where the results are exact in float16, so float32's intermediate rounding changes
// nothing.
template <class Function>
uint32_t EachHalf(Function function) {
  const auto at = [&](int shift) { return static_cast<uint32_t>(Round(function(shift), Half()).bits) << shift; };
  return at(0) | at(16);
}
inline float HalfAt(uint32_t pair, int shift) { return ToFloat(Half{static_cast<uint16_t>(pair >> shift)}); }

inline uint32_t SubtractHalves(uint32_t a, uint32_t b) {
  return EachHalf([=](int shift) { return HalfAt(a, shift) - HalfAt(b, shift); });
}
inline uint32_t MultiplyAddHalves(uint32_t a, uint32_t b, uint32_t c) {
  return EachHalf([=](int shift) { return HalfAt(a, shift) * HalfAt(b, shift) + HalfAt(c, shift); });
}
inline uint32_t AndXor(uint32_t a, uint32_t b, uint32_t c) { return (a & b) ^ c; }
inline uint32_t Permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = selector >> (4 * i) & 7u;
    result |= static_cast<uint32_t>(bytes >> (8 * digit) & 0xFFu) << (8 * i);
  }
  return result;
}

#endif

__device__ inline float ToFloat(float value) { return value; }
__device__ inline float Round(float value, float) { return value; }

// Packs two numbers into a word, `low` in the low bits.
template <class Type>
__device__ inline uint32_t Pack(Type low, Type high) {
  return static_cast<uint32_t>(low.bits) | static_cast<uint32_t>(high.bits) << 16;
}

}  // namespace healthgpt::cuda
