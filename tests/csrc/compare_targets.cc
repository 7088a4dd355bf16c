// Compares the kernels of every instruction set this machine has with the portable ones, and their results for some
// rows with those for all rows at once, which must have the same bits. Without Python: so it can be cross-compiled and
// run under an emulator (`make neon`).
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cached_attention/cached_attention.h"
#include "convolution/convolution.h"
#include "hlora_linear/hlora_linear.h"
#include "packed_attention/packed_attention.h"

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
  std::vector<uint16_t> halves;  // scales as bfloat16
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

  // Takes the random numbers for those of panels.
  void InPanels() {
    for (const float scale : scales) {
      uint32_t bits;
      std::memcpy(&bits, &scale, sizeof(bits));
      halves.push_back(static_cast<uint16_t>(bits >> 16));
    }
    matrix.scales = halves.data();
    matrix.panel = healthgpt::kPanel;
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

// What the kernels of one target were found to do.
struct Report {
  Target target;
  const char* name;
  double largest = 0;
  bool good = true;

  void Compare(const std::string& what, const std::vector<float>& found, const std::vector<float>& expected,
               double tolerance) {
    const double distance = Distance(found, expected);
    largest = std::fmax(largest, distance);
    if (distance <= tolerance) return;
    std::printf("%s, %s: relative difference %.2e\n", name, what.c_str(), distance);
    good = false;
  }

  // `part` must be what `all` holds from `at` on, to the last bit.
  void SameBits(const std::string& what, const std::vector<float>& part, const std::vector<float>& all, int64_t at) {
    if (std::memcmp(part.data(), all.data() + at, part.size() * sizeof(float)) == 0) return;
    std::printf("%s, %s: not the bits of all at once\n", name, what.c_str());
    good = false;
  }
};

// In the order of Storage.
constexpr const char* kStorages[] = {"float32", "float16", "bfloat16", "int8", "int4"};

constexpr double kTolerance = 2e-5;
// A number on the border between two bytes, or two float16, may fall either way.
constexpr double kRoundedTolerance = 5e-3;

// What stands around a linear: nothing, a normalisation, or a gated pair and a residual.
enum class Around { kNothing, kNorm, kSwigluResidual, kQuickGelu };

void CompareLinear(Report& report, Storage storage, int64_t channels, int64_t outputs, int64_t block_size,
                   int64_t experts, Around around, bool panels = false) {
  constexpr int64_t kRows = 40, kRank = 36;
  const bool integer = storage == Storage::kInt4 || storage == Storage::kInt8;
  const int64_t block = integer ? block_size : 0;
  Stored weight(storage, channels, outputs, block), out_of(storage, kRank, outputs, block);
  const Stored into(storage, channels, kRank + experts, block);
  if (panels) {
    weight.InPanels();
    out_of.InPanels();
  }
  const std::vector<float> bias = Normal(outputs), residual = Normal(kRows * outputs);
  const int64_t width = around == Around::kSwigluResidual ? 2 * channels : channels;
  std::vector<float> x = Normal(kRows * width);
  // Without adapters, numbers that bytes hold as they are.
  const bool whole = experts == 0 && around == Around::kNothing;
  for (int64_t i = 0; whole && i < kRows * channels; ++i) {
    x[i] = i % channels % block_size == 0 ? 127.0f : std::round(std::fmin(std::fmax(40 * x[i], -127.0f), 127.0f));
  }
  const auto run = [&](Target target, int64_t first, int64_t rows) {
    std::vector<float> y(static_cast<size_t>(rows * outputs));
    healthgpt::HLoraLinearArguments arguments;
    arguments.rows = rows;
    arguments.experts = experts;
    arguments.x = x.data() + first * width;
    arguments.normalise = around == Around::kNorm;
    arguments.epsilon = 1e-5f;
    if (around == Around::kSwigluResidual) {
      arguments.pair_input = true;
      arguments.residual = residual.data() + first * outputs;
    }
    arguments.quick_gelu = around == Around::kQuickGelu;
    arguments.weight = weight.matrix;
    arguments.bias = bias.data();
    arguments.adapter_in = into.matrix;
    arguments.adapter_out = out_of.matrix;
    arguments.y = y.data();
    healthgpt::HLoraLinear(arguments, healthgpt::Parallel(), target);
    return y;
  };
  const std::string what = std::string("linear of ") + kStorages[static_cast<int>(storage)] + ", " +
                           std::to_string(channels) + " x " + std::to_string(outputs) + ", around it " +
                           std::to_string(static_cast<int>(around)) + (panels ? ", in panels" : "");
  const std::vector<float> all = run(report.target, 0, kRows);
  report.Compare(what, all, run(Target::kPortable, 0, kRows), integer && !whole ? kRoundedTolerance : kTolerance);
  for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 24, 39}) {
    const int64_t first = (kRows - rows) / 2;
    report.SameBits(what + ", rows " + std::to_string(rows), run(report.target, first, rows), all, first * outputs);
  }
}

void CompareAttention(Report& report, Storage cache, int64_t group, int64_t past, int64_t size, int64_t window) {
  constexpr int64_t kTokens = 100, kKvHeads = 2;
  const int64_t heads = group * kKvHeads, capacity = past + kTokens + 3;
  // A token's queries, its keys and its values, one after the other.
  const int64_t query_size = heads * size, kv_size = kKvHeads * size, stride = query_size + 2 * kv_size;
  const std::vector<float> packed = Normal(kTokens * stride), turns = Normal(kTokens * size / 2, 0.5f);
  const auto unpack = [&](int64_t from, int64_t width) {
    std::vector<float> rows;
    for (int64_t at = from; at < kTokens * stride; at += stride) {
      rows.insert(rows.end(), packed.begin() + at, packed.begin() + at + width);
    }
    return rows;
  };
  const std::vector<float> query = unpack(0, query_size), key = unpack(query_size, kv_size);
  const std::vector<float> value = unpack(query_size + kv_size, kv_size);
  const Stored old_keys(cache, kKvHeads * capacity, size, 0), old_values(cache, kKvHeads * capacity, size, 0);
  const std::vector<float> scales = Normal(kKvHeads * capacity, 0.02f);
  // All tokens, in calls of so many each.
  const auto run = [&](Target target, const std::vector<int64_t>& pieces, bool in_place = false) {
    std::vector<uint8_t> keys = old_keys.bytes, values = old_values.bytes;
    std::vector<float> key_scales = scales, value_scales = scales;
    std::vector<float> output(static_cast<size_t>(kTokens * heads * size));
    int64_t first = 0;
    for (const int64_t tokens : pieces) {
      const int64_t length = past + first;
      healthgpt::CachedAttentionArguments arguments;
      arguments.batch = 1;
      arguments.tokens = tokens;
      arguments.heads = heads;
      arguments.kv_heads = kKvHeads;
      arguments.head_size = size;
      arguments.capacity = capacity;
      arguments.window = window;
      arguments.past_length = &length;
      if (in_place) {
        arguments.query_stride = arguments.key_stride = arguments.value_stride = stride;
        arguments.query = packed.data() + first * stride;
        arguments.key = arguments.query + query_size;
        arguments.value = arguments.key + kv_size;
      } else {
        arguments.query_stride = query_size;
        arguments.key_stride = arguments.value_stride = kv_size;
        arguments.query = query.data() + first * query_size;
        arguments.key = key.data() + first * kv_size;
        arguments.value = value.data() + first * kv_size;
      }
      arguments.cosine = arguments.sine = turns.data() + first * size / 2;
      arguments.cache = cache;
      arguments.keys = keys.data();
      arguments.values = values.data();
      arguments.key_scales = key_scales.data();
      arguments.value_scales = value_scales.data();
      arguments.output = output.data() + first * heads * size;
      healthgpt::CachedAttention(arguments, healthgpt::Parallel(), target);
      first += tokens;
    }
    return output;
  };
  const std::string what = std::string("attention of ") + kStorages[static_cast<int>(cache)] + ", " +
                           std::to_string(group) + " x " + std::to_string(size);
  const std::vector<float> all = run(report.target, {kTokens});
  report.Compare(what, all, run(Target::kPortable, {kTokens}),
                 cache == Storage::kFloat32 ? kTolerance : kRoundedTolerance);
  report.SameBits(what + ", one by one", run(report.target, std::vector<int64_t>(kTokens, 1)), all, 0);
  report.SameBits(what + ", packed", run(report.target, {kTokens}, true), all, 0);
  report.SameBits(what + ", in pieces", run(report.target, {2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 24, 9}), all, 0);
}

void ComparePackedAttention(Report& report, int64_t tokens, int64_t size) {
  constexpr int64_t kHeads = 3;
  const std::vector<float> packed = Normal(2 * tokens * 3 * kHeads * size, 2.0f);
  const auto run = [&](Target target, int64_t first, int64_t pictures) {
    std::vector<float> output(static_cast<size_t>(pictures * tokens * kHeads * size));
    healthgpt::PackedAttentionArguments arguments;
    arguments.batch = pictures;
    arguments.tokens = tokens;
    arguments.heads = kHeads;
    arguments.head_size = size;
    arguments.packed = packed.data() + first * tokens * 3 * kHeads * size;
    arguments.output = output.data();
    healthgpt::PackedAttention(arguments, healthgpt::Parallel(), target);
    return output;
  };
  const std::string what = "attention of " + std::to_string(tokens) + " tokens, 3 x " + std::to_string(size);
  const std::vector<float> both = run(report.target, 0, 2);
  report.Compare(what, both, run(Target::kPortable, 0, 2), kTolerance);
  report.SameBits(what + ", alone", run(report.target, 1, 1), both, tokens * kHeads * size);
}

void CompareConvolution(Report& report, bool half, int64_t side, int64_t channels, int64_t outputs, int64_t enlarge) {
  const int64_t pixels = side * side, y_pixels = pixels * enlarge * enlarge;
  const std::vector<float> x = Normal(2 * pixels * channels), residual = Normal(2 * y_pixels * outputs);
  const Stored weight(half ? Storage::kFloat16 : Storage::kFloat32, 9 * channels, outputs, 0);
  const std::vector<float> bias = Normal(outputs);
  const std::vector<float> norm_weight = Normal(channels), norm_bias = Normal(channels);
  const auto run = [&](Target target, int64_t first, int64_t pictures) {
    std::vector<float> y(static_cast<size_t>(pictures * y_pixels * outputs));
    healthgpt::ConvolutionArguments arguments;
    arguments.batch = pictures;
    arguments.height = arguments.width = side;
    arguments.channels = channels;
    arguments.outputs = outputs;
    arguments.groups = channels / 4;
    arguments.enlarge = enlarge;
    arguments.x = x.data() + first * pixels * channels;
    arguments.norm_weight = norm_weight.data();
    arguments.norm_bias = norm_bias.data();
    arguments.weight = weight.matrix.values;
    arguments.half = half;
    arguments.bias = bias.data();
    arguments.residual = residual.data() + first * y_pixels * outputs;
    arguments.y = y.data();
    healthgpt::Convolution(arguments, healthgpt::Parallel(), target);
    return y;
  };
  const std::string what = "convolution of " + std::to_string(channels) + " x " + std::to_string(outputs);
  const std::vector<float> both = run(report.target, 0, 2);
  report.Compare(what, both, run(Target::kPortable, 0, 2), kTolerance);
  report.SameBits(what + ", one picture", run(report.target, 1, 1), both, y_pixels * outputs);
}

}  // namespace

int main() {
  bool good = true;
  for (Report report : {Report{Target::kNeon, "neon"}, Report{Target::kAvx2, "avx2"},
                        Report{Target::kAvxVnni, "avx-vnni"}, Report{Target::kAvx512, "avx512"}}) {
    if (!healthgpt::IsSupported(report.target)) continue;
    for (const Storage storage :
         {Storage::kFloat32, Storage::kFloat16, Storage::kBFloat16, Storage::kInt8, Storage::kInt4}) {
      for (const int64_t experts : {0, 4}) {
        for (const Around around : {Around::kNothing, Around::kNorm, Around::kSwigluResidual, Around::kQuickGelu}) {
          CompareLinear(report, storage, 259, 514, 64, experts, around);
          CompareLinear(report, storage, 31, 33, 32, experts, around);
          if (storage != Storage::kInt8 && storage != Storage::kInt4) continue;
          CompareLinear(report, storage, 259, 512, 64, experts, around, true);
        }
      }
    }
    for (const Storage cache : {Storage::kFloat32, Storage::kFloat16, Storage::kInt8}) {
      CompareAttention(report, cache, 1, 130, 96, 0);
      CompareAttention(report, cache, 3, 3, 10, 50);
    }
    ComparePackedAttention(report, 65, 10);
    ComparePackedAttention(report, 200, 64);
    for (const bool half : {false, true}) {
      for (const int64_t enlarge : {1, 2}) {
        CompareConvolution(report, half, 11, 20, 70, enlarge);
        CompareConvolution(report, half, 4, 64, 3, enlarge);
      }
    }
    std::printf("%s: largest relative difference %.2e%s\n", report.name, report.largest,
                report.good ? "" : ", NOT AS IT SHOULD BE");
    good = good && report.good;
  }
#ifdef EMULATED_TARGET
  if (Target::EMULATED_TARGET == Target::kAvx512 && !healthgpt::UsesAmx()) {
    std::printf("AMX was left out: its first product was wrong\n");
    good = false;
  }
#endif
  return good ? 0 : 1;
}
