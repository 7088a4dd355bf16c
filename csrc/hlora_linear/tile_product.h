// Products of many rows with integer matrices by instructions for whole tiles (AMX): 16 rows times 32 outputs at once.
// Sums within a block are as exact as those of vectors, and are scaled and added by the same operations, so a row's
// bits do not depend on which of the two it went through.
#pragma once

#include "hlora_linear/input.h"
#include "hlora_linear/part.h"

namespace healthgpt {
namespace {

constexpr int64_t kTileRows = 16, kTileOutputs = 32;  // of Simd::MultiplyTiles
static_assert(kTile % kTileOutputs == 0);

// How many channels of a block of this size are multiplied at once; 0 if tiles cannot.
constexpr int TileChannels(int64_t block_size) {
  return block_size % 64 == 0 ? 64 : block_size < 64 && block_size % 4 == 0 ? static_cast<int>(block_size) : 0;
}

// Whether this processor's tiles give what a loop gives. For the code was written without such a processor.
template <class Target>
bool CheckTiles() {
  constexpr int64_t kChannels = 128;
  int8_t x[kTileRows * kChannels];
  uint8_t weights[kChannels * kTileOutputs];
  for (int64_t i = 0; i < kTileRows * kChannels; ++i) x[i] = static_cast<int8_t>(i * i % 251 - 125);
  for (int64_t i = 0; i < kChannels * kTileOutputs; ++i) weights[i] = static_cast<uint8_t>(i * i % 241);
  for (int at_once = 32; at_once <= 64; at_once += 32) {
    int32_t sums[kTileRows * kTileOutputs];
    Target::BeginTiles(at_once);
    Target::MultiplyTiles(x, kChannels, weights, 4 * kTileOutputs, kChannels, at_once, sums);
    Target::EndTiles();
    for (int64_t at = 0; at < kTileRows * kTileOutputs; ++at) {
      int32_t expected = 0;
      for (int64_t channel = 0; channel < kChannels; ++channel) {
        const uint8_t byte = weights[(channel / 4 * kTileOutputs + at % kTileOutputs) * 4 + channel % 4];
        const int weight = Target::kOffset8 != 0 ? byte : static_cast<int8_t>(byte);
        expected += x[at / kTileOutputs * kChannels + channel] * weight;
      }
      if (sums[at] != expected) return false;
    }
  }
  return true;
}

// Whether products are made by tiles; the first call finds out.
template <class Target>
bool TilesWork() {
  if constexpr (Target::kHasTiles) {
    static const bool work = Target::AllowsTiles() && CheckTiles<Target>();
    return work;
  } else {
    return false;
  }
}

// Tiles for one product, if they can be used for it: the processor keeps their shapes from its begin to its end.
template <class Target>
class Tiles {
 public:
  Tiles(const Matrix& matrix, int64_t rows) {
    if constexpr (Target::kHasTiles) {
      if (TilesWork<Target>() && rows >= kTileRows) channels_ = TileChannels(matrix.block_size);
      if (channels_ != 0) Target::BeginTiles(channels_);
    }
  }
  ~Tiles() {
    if constexpr (Target::kHasTiles) {
      if (channels_ != 0) Target::EndTiles();
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  bool used() const { return channels_ != 0; }

  // sums += an unpacked tile times as many of the part's rows as make whole groups of kTileRows; returns their number.
  // `offset` was added to each weight.
  template <int offset>
  int64_t Add(const Matrix& matrix, const Input& input, int64_t block, const Part& part, int64_t tile,
              const float* scales, const Sums& sums) const {
    int64_t row = 0;
    if constexpr (Target::kHasTiles) {
      if (channels_ == 0) return 0;
      const int64_t size = matrix.block_size, stride = part.stride;
      const uint8_t* weights = static_cast<const uint8_t*>(part.unpacked);
      // A group's products are scaled while the next ones are made.
      int32_t products[2][kTileRows * kTileOutputs];
      Group waiting = {};
      int turn = 0;
      for (; row + kTileRows <= part.rows; row += kTileRows) {
        const int64_t first = block * input.rows + part.row + row;
        for (int64_t column = 0; column < kTile; column += kTileOutputs) {
          // The whole block: past the matrix' last channel x is zero, whatever the weights are.
          Target::MultiplyTiles(input.bytes + first * size, size, weights + 4 * column, 4 * kTile, size, channels_,
                                products[turn]);
          if (waiting.products != nullptr) AddScaled<offset>(waiting, stride);
          const Sums place = sums.At(row * stride + tile * kTile + column);
          waiting = {products[turn], input.sums + first, input.scales + first, scales + column, place};
          turn = 1 - turn;
        }
      }
      if (waiting.products != nullptr) AddScaled<offset>(waiting, stride);
    }
    return row;
  }

 private:
  // The products (kTileRows, kTileOutputs) of a group of rows, with what they are scaled by and added to.
  struct Group {
    const int32_t* products;
    const int32_t* x_sums;
    const float* x_scales;
    const float* scales;
    Sums sums;
  };

  template <int offset>
  static void AddScaled(const Group& group, int64_t stride) {
    constexpr int kCount = static_cast<int>(kTileOutputs / Target::kLanes);
    const int32_t *products = group.products, *x_sums = group.x_sums;
    const float* x_scales = group.x_scales;
    Floats scales[kCount];
    Unroll<kCount>([&](auto i) SIMD_INLINE_LAMBDA { scales[i] = Target::Load(group.scales + i * Target::kLanes); });
    const auto add = [&](const Sums& sums) SIMD_INLINE_LAMBDA {
      for (int64_t r = 0; r < kTileRows; ++r) {
        const Ints start = Target::RepeatInt(-offset * x_sums[r]);
        const Floats x_scale = Target::Repeat(x_scales[r]);
        Unroll<kCount>([&](auto i) SIMD_INLINE_LAMBDA {
          const int64_t column = i * Target::kLanes;
          const Ints product = Target::AddInts(start, Target::LoadInts(products + r * kTileOutputs + column));
          sums.Add(r * stride + column, Target::ToFloats(product), Target::Multiply(x_scale, scales[i]));
        });
      }
    };
    group.sums.ByKind(add);
  }

  int channels_ = 0;  // at once; 0 if tiles are not used
};

}  // namespace
}  // namespace healthgpt
