// Compares the kernels of every instruction set this machine has with the portable ones, without Python: so it can be
// cross-compiled and run under an emulator (`make neon`).
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cached_attention/cached_attention.h"
#include "convolution/convolution.h"
#include "hlora_linear/hlora_linear.h"

namespace {

using healthgpt::Storage;
using healthgpt::Target;

std::mt19937 random_bits(0);

std::vector<float> Normal(int64_t count, float scale = 1.0f) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(random_bits);
  return values;
}

struct Stored {
  std::vector<uint8_t> bytes;
  std::vector<float> scales;
  healthgpt::Matrix matrix;

  Stored(Storage storage, int64_t channels, int64_t outputs, int64_t block_size) {
    const int64_t numbers = channels * outputs;
    matrix = {nullptr, nullptr, storage, channels, outputs, block_size};
    if (storage == Storage::kFloat32) {
      const std::vector<float> values = Normal(numbers, 0.05f);
      const auto* from = reinterpret_cast<const uint8_t*>(values.data());
      bytes.assign(from, from + 4 * numbers);
    } else {
      bytes.resize(static_cast<size_t>(storage == Storage::kInt4 ? (numbers + 1) / 2
                                                                 : numbers * (storage == Storage::kInt8 ? 1 : 2)));
      for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random_bits());
      // Of 16 bits, numbers below one: no infinities.
      if (storage == Storage::kFloat16 || storage == Storage::kBFloat16) {
        const int end = storage == Storage::kFloat16 ? 0x2C : 0x3F;
        for (size_t i = 1; i < bytes.size(); i += 2)
          bytes[i] = static_cast<uint8_t>((bytes[i] & 0x80) | (bytes[i] & 0x3F) % end);
      }
    }
    if (block_size > 0) {
      scales = Normal((channels + block_size - 1) / block_size * outputs, storage == Storage::kInt4 ? 0.02f : 0.001f);
      matrix.scales = scales.data();
    }
    matrix.values = bytes.data();
  }
};

// The largest difference, relative to the largest expected value; infinite where anything is not finite.
double Distance(const std::vector<float>& found, const std::vector<float>& expected) {
  double most = 0, largest = 1e-9;
  for (size_t i = 0; i < found.size(); ++i) {
    if (!std::isfinite(found[i])) return INFINITY;
    most = std::fmax(most, std::fabs(static_cast<double>(found[i]) - expected[i]));
    largest = std::fmax(largest, std::fabs(static_cast<double>(expected[i])));
  }
  return most / largest;
}

double CompareLinear(Target target, Storage storage, int64_t rows, int64_t channels, int64_t outputs) {
  constexpr int64_t kRank = 36, kExperts = 4;
  const int64_t block = storage == Storage::kInt4 || storage == Storage::kInt8 ? 64 : 0;
  const Stored weight(storage, channels, outputs, block), into(storage, channels, kRank + kExperts, block);
  const Stored out_of(storage, kRank, outputs, block);
  const std::vector<float> x = Normal(rows * channels), bias = Normal(outputs);
  std::vector<float> y[2];
  for (int i = 0; i < 2; ++i) {
    y[i].resize(static_cast<size_t>(rows * outputs));
    const healthgpt::HLoraLinearArguments arguments = {rows,        kExperts,    x.data(),      weight.matrix,
                                                       bias.data(), into.matrix, out_of.matrix, y[i].data()};
    healthgpt::HLoraLinear(arguments, healthgpt::Parallel(), i == 0 ? target : Target::kPortable);
  }
  return Distance(y[0], y[1]);
}

double CompareAttention(Target target, Storage cache, int64_t tokens, int64_t past, int64_t size) {
  constexpr int64_t kHeads = 4, kKvHeads = 2;
  const int64_t capacity = past + tokens + 3;
  const std::vector<float> query = Normal(tokens * kHeads * size), key = Normal(tokens * kKvHeads * size);
  const std::vector<float> value = Normal(tokens * kKvHeads * size), turns = Normal(tokens * size / 2, 0.5f);
  const Stored old_keys(cache, kKvHeads * capacity, size, 0), old_values(cache, kKvHeads * capacity, size, 0);
  const std::vector<float> scales = Normal(kKvHeads * capacity, 0.02f);
  std::vector<float> output[2];
  for (int i = 0; i < 2; ++i) {
    std::vector<uint8_t> keys = old_keys.bytes, values = old_values.bytes;
    std::vector<float> key_scales = scales, value_scales = scales;
    output[i].resize(static_cast<size_t>(tokens * kHeads * size));
    healthgpt::CachedAttentionArguments arguments;
    arguments.batch = 1;
    arguments.tokens = tokens;
    arguments.heads = kHeads;
    arguments.kv_heads = kKvHeads;
    arguments.head_size = size;
    arguments.capacity = capacity;
    arguments.past_length = &past;
    arguments.query = query.data();
    arguments.key = key.data();
    arguments.value = value.data();
    arguments.cosine = arguments.sine = turns.data();
    arguments.cache = cache;
    arguments.keys = keys.data();
    arguments.values = values.data();
    arguments.key_scales = key_scales.data();
    arguments.value_scales = value_scales.data();
    arguments.output = output[i].data();
    healthgpt::CachedAttention(arguments, healthgpt::Parallel(), i == 0 ? target : Target::kPortable);
  }
  return Distance(output[0], output[1]);
}

double CompareConvolution(Target target, bool half, int64_t side, int64_t channels, int64_t outputs, int64_t enlarge) {
  const int64_t pixels = 2 * side * side;
  const std::vector<float> x = Normal(pixels * channels), residual = Normal(pixels * enlarge * enlarge * outputs);
  const Stored weight(half ? Storage::kFloat16 : Storage::kFloat32, 9 * channels, outputs, 0);
  const std::vector<float> bias = Normal(outputs);
  const std::vector<float> norm_weight = Normal(channels), norm_bias = Normal(channels);
  std::vector<float> y[2];
  for (int i = 0; i < 2; ++i) {
    y[i].resize(residual.size());
    healthgpt::ConvolutionArguments arguments;
    arguments.batch = 2;
    arguments.height = arguments.width = side;
    arguments.channels = channels;
    arguments.outputs = outputs;
    arguments.groups = channels / 4;
    arguments.enlarge = enlarge;
    arguments.x = x.data();
    arguments.norm_weight = norm_weight.data();
    arguments.norm_bias = norm_bias.data();
    arguments.weight = weight.matrix.values;
    arguments.half = half;
    arguments.bias = bias.data();
    arguments.residual = residual.data();
    arguments.y = y[i].data();
    healthgpt::Convolution(arguments, healthgpt::Parallel(), i == 0 ? target : Target::kPortable);
  }
  return Distance(y[0], y[1]);
}

}  // namespace

int main() {
  const struct {
    Target target;
    const char* name;
  } targets[] = {
      {Target::kNeon, "neon"}, {Target::kAvx2, "avx2"}, {Target::kAvxVnni, "avx-vnni"}, {Target::kAvx512, "avx512"}};
  bool good = true;
  for (const auto& [target, name] : targets) {
    if (!healthgpt::IsSupported(target)) continue;
    double worst = 0;
    for (const Storage storage :
         {Storage::kFloat32, Storage::kFloat16, Storage::kBFloat16, Storage::kInt8, Storage::kInt4}) {
      for (const int64_t rows : {1, 2, 3, 4, 19}) {
        worst = std::fmax(worst, CompareLinear(target, storage, rows, 259, 514));
        worst = std::fmax(worst, CompareLinear(target, storage, rows, 31, 33));
      }
    }
    for (const Storage cache : {Storage::kFloat32, Storage::kFloat16, Storage::kInt8}) {
      for (const int64_t tokens : {1, 5, 80}) {
        worst = std::fmax(worst, CompareAttention(target, cache, tokens, 130, 96));
        worst = std::fmax(worst, CompareAttention(target, cache, tokens, 3, 10));
      }
    }
    for (const bool half : {false, true}) {
      for (const int64_t enlarge : {1, 2}) {
        worst = std::fmax(worst, CompareConvolution(target, half, 11, 20, 70, enlarge));
        worst = std::fmax(worst, CompareConvolution(target, half, 4, 64, 3, enlarge));
      }
    }
    // Rounding alone; a value on the border between two bytes may fall either way.
    const bool agrees = worst < 5e-3;
    std::printf("%s: largest relative difference %.2e%s\n", name, worst, agrees ? "" : " IS TOO MUCH");
    good = good && agrees;
  }
  return good ? 0 : 1;
}
