// The vector operations of the kernels in plain C++: they define each operation, and run where no other header can.
// Each instruction set has a header with the same struct. A kernel's source is compiled once with each header.
#pragma once

#include <cmath>
#include <cstdint>

#define SIMD_IN_MEMORY  // the vectors here are arrays
#include "simd/unroll.h"

namespace healthgpt {
namespace {

struct Simd {
  // The number of floats or 32-bit integers in a vector. Bytes has 4 * kLanes bytes, in lanes of 16.
  static constexpr int kLanes = 4;
  static constexpr int kRegisters = 16;        // assumed
  static constexpr bool kInRegisters = false;  // whether vectors are in registers
  static constexpr bool kHasTiles = true;      // whether there are the operations on tiles
  struct Bytes {
    uint8_t at[16];
  };
  struct Ints {
    int32_t at[4];
  };
  struct Floats {
    float at[4];
  };

  // Whether weights and caches that few rows will read are prefetched into the L1 cache, not only into the L2 cache.
  static bool PrefetchesNear() { return false; }

  // --- bytes and dot products ---
  // Shift4 and Shift8 add these to a weight. A dot product is therefore too large by the offset times the sum of x.
  static constexpr int kOffset4 = 0;
  static constexpr int kOffset8 = 0;
  // How many pairs of products with 4-bit weights can be summed in 16 bits; 1 if Dot4 does not sum pairs in 16 bits.
  static constexpr int kPairsPerSum4 = 1;

  static Bytes LoadBytes(const void* from) { return LoadBytes(from, 16); }
  // The first count bytes, then zeros.
  static Bytes LoadBytes(const void* from, int count) {
    Bytes bytes = {};
    for (int i = 0; i < 16 && i < count; ++i) bytes.at[i] = static_cast<const uint8_t*>(from)[i];
    return bytes;
  }
  static void StoreBytes(void* to, Bytes bytes) { *static_cast<Bytes*>(to) = bytes; }
  static Bytes NoBytes() { return Bytes{}; }

  // Turns four rows of bytes into one 32-bit integer per column, with the column's byte of each row. Within each lane
  // of 16 bytes, vector i then holds columns 4 i to 4 i + 3.
  static void Interleave(Bytes (&rows)[4]) {
    const Bytes before[4] = {rows[0], rows[1], rows[2], rows[3]};
    for (int column = 0; column < 16; ++column) {
      for (int row = 0; row < 4; ++row) rows[column / 4].at[column % 4 * 4 + row] = before[row].at[column];
    }
  }
  // Vectors 2 kHalf and 2 kHalf + 1 of Interleave.
  template <int kHalf>
  static void InterleaveHalf(Bytes a, Bytes b, Bytes c, Bytes d, Bytes (&to)[2]) {
    Bytes rows[4] = {a, b, c, d};
    Interleave(rows);
    to[0] = rows[2 * kHalf];
    to[1] = rows[2 * kHalf + 1];
  }
  // Converts two's complement weights to the form that Even/OddNibbles and Dot4, or Dot8, take.
  static Bytes Shift4(Bytes nibbles) { return nibbles; }
  static Bytes Shift8(Bytes bytes) { return bytes; }
  static Bytes EvenNibbles(Bytes shifted) {
    for (uint8_t& byte : shifted.at) byte = static_cast<uint8_t>(((byte & 0x0F) ^ 8) - 8);
    return shifted;
  }
  static Bytes OddNibbles(Bytes shifted) {
    for (uint8_t& byte : shifted.at) byte = static_cast<uint8_t>(((byte >> 4) ^ 8) - 8);
    return shifted;
  }
  // Two 4-bit weights in one byte, for which a product takes fewer operations than for Even/OddNibbles: 16 times the
  // odd nibble plus the even one, or the former alone. kJoinedOffset4 and kUpperOffset4 are what they are too large by.
  static constexpr int kJoinedOffset4 = 8;
  static constexpr int kUpperOffset4 = 0;
  static Bytes Join4(Bytes nibbles) {
    for (uint8_t& byte : nibbles.at) byte ^= 0x08;
    return nibbles;
  }
  static Bytes Upper4(Bytes joined) {
    for (uint8_t& byte : joined.at) byte &= 0xF0;
    return joined;
  }
  // Turns the sums of joined and of upper nibbles into those of even and of odd ones.
  static void Separate4(Ints& joined, Ints& upper) {
    for (int i = 0; i < 4; ++i) {
      joined.at[i] -= upper.at[i];
      upper.at[i] /= 16;
    }
  }
  // The same four bytes in every 32-bit integer.
  static Bytes Repeat4(const int8_t* four) {
    Bytes bytes;
    for (int i = 0; i < 16; ++i) bytes.at[i] = static_cast<uint8_t>(four[i % 4]);
    return bytes;
  }
  // sum + the dot products of four neighbouring bytes each. Nothing saturates, because x is at least -127.
  static Ints Dot4(Ints sum, Bytes weights, Bytes x) { return Dot8(sum, weights, x); }
  static Ints Dot8(Ints sum, Bytes weights, Bytes x) {
    for (int i = 0; i < 16; ++i) {
      sum.at[i / 4] += static_cast<int8_t>(weights.at[i]) * static_cast<int8_t>(x.at[i]);
    }
    return sum;
  }
  static Ints AsInts(Bytes bytes) {
    Ints ints;
    __builtin_memcpy(&ints, &bytes, 16);
    return ints;
  }
  static Ints LoadInts(const int32_t* from) { return *reinterpret_cast<const Ints*>(from); }
  static void StoreInts(int32_t* to, Ints values) { *reinterpret_cast<Ints*>(to) = values; }
  static Ints RepeatInt(int32_t value) { return Ints{{value, value, value, value}}; }

  // Brings sums into the order of columns. Before, sums 2 i (even nibbles) and 2 i + 1 (odd) belong to vector i of
  // Interleave.
  static void Order4(Ints (&sums)[8]) {
    for (int i = 0; i < 8; i += 2) {
      const Ints even = sums[i], odd = sums[i + 1];
      sums[i] = Ints{{even.at[0], odd.at[0], even.at[1], odd.at[1]}};
      sums[i + 1] = Ints{{even.at[2], odd.at[2], even.at[3], odd.at[3]}};
    }
  }
  // The same if sums i and 4 + i belong to vector i of two neighbouring Interleaves.
  static void Order8(Ints (&)[8]) {}
  // Their inverses.
  static void Disorder4(Ints (&sums)[8]) {
    for (int i = 0; i < 8; i += 2) {
      const Ints first = sums[i], second = sums[i + 1];
      sums[i] = Ints{{first.at[0], first.at[2], second.at[0], second.at[2]}};
      sums[i + 1] = Ints{{first.at[1], first.at[3], second.at[1], second.at[3]}};
    }
  }
  static void Disorder8(Ints (&)[8]) {}

  // --- floats ---
  static Floats ToFloats(Ints values) {
    return Map([&](int i) { return static_cast<float>(values.at[i]); });
  }
  static Ints FloatBits(Floats a) {
    Ints bits;
    __builtin_memcpy(&bits, &a, 16);
    return bits;
  }
  static Floats FromBits(Ints bits) {
    Floats floats;
    __builtin_memcpy(&floats, &bits, 16);
    return floats;
  }
  static Floats Load(const float* from) { return Load(from, 4); }
  // The first count numbers, then zeros.
  static Floats Load(const float* from, int count) {
    return Map([&](int i) { return i < count ? from[i] : 0.0f; });
  }
  static void Store(float* to, Floats values) { Store(to, values, 4); }
  static void Store(float* to, Floats values, int count) {
    for (int i = 0; i < 4 && i < count; ++i) to[i] = values.at[i];
  }
  // The first count float16, then zeros.
  static Floats LoadHalf(const uint16_t* from, int count = kLanes) {
    return Map([&](int i) { return i < count ? FromHalf(from[i]) : 0.0f; });
  }
  // The first count bfloat16 (the upper halves of float32), then zeros.
  static Floats LoadBFloat16(const uint16_t* from, int count = kLanes) {
    return Map([&](int i) { return i < count ? FromBits(static_cast<uint32_t>(from[i]) << 16) : 0.0f; });
  }
  static Floats LoadInt8(const int8_t* from) {
    return Map([&](int i) { return static_cast<float>(from[i]); });
  }
  static void StoreHalf(uint16_t* to, Floats values) {
    for (int i = 0; i < 4; ++i) to[i] = ToHalf(values.at[i]);
  }
  static Floats Repeat(float value) { return Floats{{value, value, value, value}}; }
  static Floats Add(Floats a, Floats b) {
    return Map([&](int i) { return a.at[i] + b.at[i]; });
  }
  static Floats Multiply(Floats a, Floats b) {
    return Map([&](int i) { return a.at[i] * b.at[i]; });
  }
  static Floats Divide(Floats a, Floats b) {
    return Map([&](int i) { return a.at[i] / b.at[i]; });
  }
  // a b + c, rounded once or twice, but always in the same way on one machine.
  static Floats MultiplyAdd(Floats a, Floats b, Floats c) {
    return Map([&](int i) { return a.at[i] * b.at[i] + c.at[i]; });
  }
  static Floats Max(Floats a, Floats b) {
    return Map([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
  }
  static Floats Magnitude(Floats a) {
    return Map([&](int i) { return std::fabs(a.at[i]); });
  }
  // To the nearest integer, ties to even.
  static Floats Round(Floats a) {
    return Map([&](int i) { return std::nearbyintf(a.at[i]); });
  }
  // 2^whole for integers from -126 to 127.
  static Floats PowerOfTwo(Floats whole) {
    return Map([&](int i) { return FromBits(static_cast<uint32_t>(static_cast<int32_t>(whole.at[i]) + 127) << 23); });
  }
  static float Sum(Floats a) { return (a.at[0] + a.at[2]) + (a.at[1] + a.at[3]); }
  // The sums of kLanes rows.
  static Floats SumEach(const Floats (&rows)[4]) {
    return Map([&](int i) { return Sum(rows[i]); });
  }
  static float Largest(Floats a) {
    const float first = a.at[0] > a.at[1] ? a.at[0] : a.at[1], second = a.at[2] > a.at[3] ? a.at[2] : a.at[3];
    return first > second ? first : second;
  }
  // kLanes numbers in [-128, 127], rounded to the nearest, ties to even. NaN gives any byte.
  static void StoreRounded(int8_t* to, Floats values) {
    for (int i = 0; i < 4; ++i) {
      const float clamped = values.at[i] > -128.0f ? (values.at[i] < 127.0f ? values.at[i] : 127.0f) : -128.0f;
      to[i] = static_cast<int8_t>(std::nearbyintf(clamped));
    }
  }

  // --- tiles: products of 16 rows with 32 columns ---
  // Whether this process may use them.
  static bool AllowsTiles() { return true; }
  // Between these two a thread may call MultiplyTiles, for so many channels at a time: a multiple of 4 up to 64.
  static void BeginTiles(int) {}
  static void EndTiles() {}
  // sums (16, 32) = x (16, channels) times weights (channels / 4, 32, 4), by Dot8; strides in bytes.
  static void MultiplyTiles(const int8_t* x, int64_t x_stride, const uint8_t* weights, int64_t stride, int64_t channels,
                            int, int32_t* sums) {
    constexpr int kRows = 4, kSums = 2;
    for (int at = 0; at < 16 * 32; at += kRows * kSums * kLanes) {
      const int row = at / (kRows * 32) * kRows, column = at / kRows % 32;
      Ints totals[kRows][kSums] = {};
      for (int64_t channel = 0; channel < channels; channel += 4) {
        const uint8_t* from = weights + channel / 4 * stride + 4 * column;
        Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
          const Bytes bytes = Repeat4(x + (row + r) * x_stride + channel);
          Unroll<kSums>([&](auto i) SIMD_INLINE_LAMBDA {
            totals[r][i] = Dot8(totals[r][i], LoadBytes(from + 4 * i * kLanes), bytes);
          });
        });
      }
      Unroll<kRows>([&](auto r) SIMD_INLINE_LAMBDA {
        Unroll<kSums>([&](auto i)
                          SIMD_INLINE_LAMBDA { StoreInts(sums + (row + r) * 32 + column + i * kLanes, totals[r][i]); });
      });
    }
  }
  static Ints AddInts(Ints a, Ints b) {
    for (int i = 0; i < kLanes; ++i) a.at[i] += b.at[i];
    return a;
  }

 private:
  template <class Function>
  static Floats Map(Function function) {
    return Floats{{function(0), function(1), function(2), function(3)}};
  }
  static float FromBits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
  }
  static float FromHalf(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7FFF;
    if (rest >= 0x7C00) return FromBits(sign | 0x7F800000 | (rest & 0x3FF) << 13);
    if (rest >= 0x0400) return FromBits(sign | ((rest << 13) + (112u << 23)));
    const float small = static_cast<float>(rest) * 5.9604645e-8f;  // subnormal: multiples of 2^-24
    return sign != 0 ? -small : small;
  }
  static uint16_t ToHalf(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7FFFFFFF;
    if (bits > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
    if (bits >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // rounds to 65536 or more
    if (bits < 0x38800000) {                                              // below 2^-14: multiples of 2^-24
      return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyintf(FromBits(bits) * 16777216.0f)));
    }
    bits += 0xFFF + (bits >> 13 & 1);  // rounds to nearest, ties to even
    return static_cast<uint16_t>(sign | ((bits - (112u << 23)) >> 13));
  }
};

}  // namespace
}  // namespace healthgpt
