// From stored weights to operands of the tensor cores, in registers: no weight passes through shared memory.
//
// A warp reads 16 channels of kLaneOutputs * 8 outputs at a time. Lane 4 g + t reads channels 4 t to 4 t + 3 of
// kLaneOutputs outputs from g * kLaneOutputs on: adjacent bytes in four rows of the matrix. These are exactly the
// weights that this lane needs for the products. (Channels may be assigned to a product's columns in any order, as long
// as x uses the same order.)
#pragma once

#include "cuda/tensor_cores.cuh"
#include "hlora_linear/cuda.h"

namespace healthgpt::cuda {

constexpr int kStepChannels = 16;

// A matrix as kernels take it.
struct Weights {
  const void* values = nullptr;
  const float* scales = nullptr;
  int channels = 0;
  int outputs = 0;
  int64_t stride = 0;
  uint32_t row_bytes = 0;           // the stride in bytes: a matrix is below 4 GiB
  int block_bits = 0;               // 2 to this power is the block size
  bool is_aligned = false;          // wide loads may read every row
  bool scales_are_aligned = false;  // four scales may be loaded at once
};

template <Storage storage>
struct Format;

template <class Type>
struct FloatFormat {
  using Number = Type;  // of the products
  using Word = uint4;   // a lane's load
  static constexpr int kLaneOutputs = 8;
  static constexpr bool kIsInteger = false;

  __device__ static uint32_t Element(const void* values, int64_t at) {
    return static_cast<const uint16_t*>(values)[at];
  }
  static constexpr int kElementBits = 16;

  // Unpack gives the left operands of kUnpacked products, each of two outputs, in the order of the outputs.
  static constexpr int kUnpacked = 1;
  __device__ static void Unpack(const uint32_t (&words)[4][4], int j, Left (&left)[1]) {
    left[0] = {Permute(words[0][j], words[1][j], 0x5410), Permute(words[0][j], words[1][j], 0x7632),
               Permute(words[2][j], words[3][j], 0x5410), Permute(words[2][j], words[3][j], 0x7632)};
  }
};
template <>
struct Format<Storage::kFloat16> : FloatFormat<Half> {};
template <>
struct Format<Storage::kBFloat16> : FloatFormat<BFloat16> {};

// Integers become float16, which holds them exactly. Written into the low bits of the number 1024, an integer n gives
// 1024 + n.
template <>
struct Format<Storage::kInt8> {
  using Number = Half;
  using Word = uint4;
  static constexpr int kLaneOutputs = 16;
  static constexpr bool kIsInteger = true;
  static constexpr int kElementBits = 8;

  __device__ static uint32_t Element(const void* values, int64_t at) { return static_cast<const uint8_t*>(values)[at]; }

  // Outputs 4 q to 4 q + 3 at two channels.
  __device__ static void Pair(uint32_t first, uint32_t second, uint32_t (&halves)[4]) {
    first ^= 0x80808080u;  // adds 128, so that no byte is negative
    second ^= 0x80808080u;
    const uint32_t low = Permute(first, second, 0x5140), high = Permute(first, second, 0x7362);
    const uint32_t raised[4] = {Permute(low, 0x64646464u, 0x4140), Permute(low, 0x64646464u, 0x4342),
                                Permute(high, 0x64646464u, 0x4140), Permute(high, 0x64646464u, 0x4342)};
    for (int i = 0; i < 4; ++i) halves[i] = SubtractHalves(raised[i], 0x64806480u);  // 1024 + 128
  }
  static constexpr int kUnpacked = 2;
  __device__ static void Unpack(const uint32_t (&words)[4][4], int q, Left (&left)[2]) {
    uint32_t low[4], high[4];
    Pair(words[0][q], words[1][q], low);
    Pair(words[2][q], words[3][q], high);
    left[0] = {low[0], low[1], high[0], high[1]};
    left[1] = {low[2], low[3], high[2], high[3]};
  }
};

template <>
struct Format<Storage::kInt4> {
  using Number = Half;
  using Word = uint2;
  static constexpr int kLaneOutputs = 16;
  static constexpr bool kIsInteger = true;
  static constexpr int kElementBits = 4;

  __device__ static uint32_t Element(const void* values, int64_t at) {
    return static_cast<const uint8_t*>(values)[at / 2] >> (at % 2 * 4) & 15u;
  }

  // Four outputs at two channels, whose nibbles are in the two halves of `nibbles`. Flipping a nibble's sign bit
  // adds 8.
  __device__ static void Quad(uint32_t nibbles, uint32_t (&halves)[4]) {
    for (int i = 0; i < 4; i += 2, nibbles >>= 8) {
      halves[i] = SubtractHalves(AndXor(nibbles, 0x000F000Fu, 0x64086408u), 0x64086408u);  // 1024 + 8
      // This nibble counts 16 times as much where it stands: multiply by 1/16, then subtract 64 + 8.
      halves[i + 1] = MultiplyAddHalves(AndXor(nibbles, 0x00F000F0u, 0x64806480u), 0x2C002C00u, 0xD480D480u);
    }
  }
  static constexpr int kUnpacked = 2;
  __device__ static void Unpack(const uint32_t (&words)[4][2], int q, Left (&left)[2]) {
    const uint32_t selector = q % 2 == 0 ? 0x5410 : 0x7632;
    uint32_t low[4], high[4];
    Quad(Permute(words[0][q / 2], words[1][q / 2], selector), low);
    Quad(Permute(words[2][q / 2], words[3][q / 2], selector), high);
    left[0] = {low[0], low[1], high[0], high[1]};
    left[1] = {low[2], low[3], high[2], high[3]};
  }
};

// A lane's words of four channels, gathered number by number, with zeros outside the matrix.
template <class Format, int kWords>
__device__ inline void GatherChannels(const Weights& weights, int channel, int output, uint32_t (&words)[4][kWords]) {
  constexpr int kPerWord = 32 / Format::kElementBits;
#pragma unroll 1  // rarely used: it must not take registers from the usual path
  for (int at = 4 * kWords - 1; at >= 0; --at) {
    const int from = output + at % kWords * kPerWord, here = channel + at / kWords;
    const int count = Least(here < weights.channels ? weights.outputs - from : 0, kPerWord);
    uint32_t word = 0;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      word |= Format::Element(weights.values, here * weights.stride + from + i) << (i * Format::kElementBits);
    }
    // All words move on by one, because registers cannot be indexed.
#pragma unroll
    for (int i = 4 * kWords - 1; i > 0; --i) words[i / kWords][i % kWords] = words[(i - 1) / kWords][(i - 1) % kWords];
    words[0][0] = word;
  }
}

// A lane's words of a step: its four channels from `channel` on. Lanes past the last output load the first outputs
// instead; their results are never used.
template <class Format>
struct Step {
  static constexpr int kWords = sizeof(typename Format::Word) / 4;
  uint32_t words[4][kWords];

  __device__ void Load(const Weights& weights, int channel, int output) {
    const int t = static_cast<int>(threadIdx.x % 4);
    if (!weights.is_aligned || channel + kStepChannels > weights.channels) {
      GatherChannels<Format>(weights, channel + 4 * t, output, words);
      return;
    }
    const int from = (output < weights.outputs ? output : 0) * Format::kElementBits / 8;
    const uint32_t at = static_cast<uint32_t>(channel + 4 * t) * weights.row_bytes + static_cast<uint32_t>(from);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const auto word =
          LoadOnce<typename Format::Word>(static_cast<const char*>(weights.values) + (at + c * weights.row_bytes));
      words[c][0] = word.x;
      words[c][1] = word.y;
      if constexpr (kWords == 4) {
        words[c][2] = word.z;
        words[c][3] = word.w;
      }
    }
  }
};

}  // namespace healthgpt::cuda
