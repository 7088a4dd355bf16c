// The nodes healthgpt::CachedAttention and healthgpt::PackedCachedAttention (export/graph/functions.py), for the CPU
// and for a GPU.
#pragma once

#include <array>
#include <type_traits>

#include "onnxruntime/operator.h"

namespace healthgpt {

// A Launcher computes the node. It defines its Arguments and its caches' type (kStorage), is made with the session and
// called as launcher(arguments, call). It has two static functions: CheckLengths(past_length, arguments), which checks
// nothing if the lengths are on a GPU, and Copy(call, to, from, bytes). With `packed`, query, key and value are one
// input.
template <class Launcher, bool packed = false>
class CachedAttentionKernel {
  using Arguments = typename Launcher::Arguments;
  static constexpr auto kStorage = Launcher::kStorage;
  using Storage = std::remove_const_t<decltype(kStorage)>;
  static constexpr bool kHasScales = kStorage == Storage::kInt8;
  static constexpr OrtElementType kCache = kHasScales                      ? kOrtInt8
                                           : kStorage == Storage::kFloat16 ? kOrtFloat16
                                                                           : kOrtFloat32;
  static constexpr int64_t kCacheBytes = kHasScales ? 1 : kStorage == Storage::kFloat16 ? 2 : 4;
  static constexpr Operand kApart[] = {{"query", kOrtFloat32}, {"key", kOrtFloat32}, {"value", kOrtFloat32}};
  static constexpr Operand kPacked[] = {{"packed", kOrtFloat32}};
  static constexpr Operand kOthers[] = {
      {"cosine", kOrtFloat32},
      {"sine", kOrtFloat32},
      {"past_length", kOrtInt64},
      {"visible", kOrtBool},  // only for the function body: a kernel uses
                              // past_length and window instead
      {"past_key", kCache},
      {"past_value", kCache},
      {"past_key_scale", kOrtFloat32, kOrtOptional},
      {"past_value_scale", kOrtFloat32, kOrtOptional},
  };
  static constexpr size_t kRows = packed ? std::size(kPacked) : std::size(kApart);  // inputs before kOthers
  static constexpr auto kOperands = [] {
    std::array<Operand, kRows + std::size(kOthers)> operands = {};
    for (size_t i = 0; i < kRows; ++i) operands[i] = packed ? kPacked[i] : kApart[i];
    for (size_t i = 0; i < std::size(kOthers); ++i) operands[kRows + i] = kOthers[i];
    return operands;
  }();

 public:
  static constexpr const char* kName = packed ? "PackedCachedAttention" : "CachedAttention";
  static constexpr const auto& kInputs = kOperands;
  static constexpr Operand kOutputs[] = {
      {"output", kOrtFloat32},
      {"present_key", kCache},
      {"present_value", kCache},
      {"present_key_scale", kOrtFloat32, kOrtOptional},
      {"present_value_scale", kOrtFloat32, kOrtOptional},
  };

  explicit CachedAttentionKernel(const Attributes& attributes)
      : heads_(attributes.Integer("heads", 1, INT32_MAX)),
        kv_heads_(attributes.Integer("kv_heads", 1, INT32_MAX)),
        window_(attributes.Integer("window", 0, INT32_MAX)) {
    if (heads_ % kv_heads_ != 0) {
      throw std::invalid_argument("heads must be a multiple of " + std::to_string(kv_heads_) + " kv_heads, found " +
                                  std::to_string(heads_));
    }
  }

  void Compute(Call& call) const {
    const Tensor rows = call.Input(0), past_length = call.Input(kRows + 2), past_key = call.Input(kRows + 4);
    const int64_t all_heads = packed ? heads_ + 2 * kv_heads_ : heads_;
    if (rows.rank != 3 || rows.shape[2] == 0 || rows.shape[2] % (2 * all_heads) != 0) {
      throw std::invalid_argument(std::string(rows.name) + " must be [B, S, " + std::to_string(all_heads) +
                                  " heads of an even size], found " + rows.ShapeText());
    }
    if (past_key.rank != 4) {
      throw std::invalid_argument("past_key must have 4 dimensions, found " + past_key.ShapeText());
    }
    Arguments arguments;
    arguments.batch = rows.shape[0];
    arguments.tokens = rows.shape[1];
    arguments.heads = heads_;
    arguments.kv_heads = kv_heads_;
    arguments.head_size = rows.shape[2] / all_heads;
    arguments.capacity = past_key.shape[2];
    arguments.window = window_;
    arguments.cache = kStorage;
    past_length.Expect({arguments.batch});
    Launcher::CheckLengths(past_length, arguments);
    arguments.past_length = past_length.As<int64_t>();
    arguments.query = rows.As<float>();
    arguments.query_stride = rows.shape[2];
    const int64_t size = arguments.head_size, half = size / 2;
    if constexpr (packed) {
      arguments.key = arguments.query + heads_ * size;
      arguments.value = arguments.key + kv_heads_ * size;
      arguments.key_stride = arguments.value_stride = rows.shape[2];
    } else {
      arguments.key_stride = arguments.value_stride = kv_heads_ * size;
      arguments.key = Rows(call.Input(1), arguments, arguments.key_stride);
      arguments.value = Rows(call.Input(2), arguments, arguments.value_stride);
    }
    arguments.cosine = Rows(call.Input(kRows), arguments, half);
    arguments.sine = Rows(call.Input(kRows + 1), arguments, half);
    arguments.keys = Present(call, 1, past_key, arguments, size, kCacheBytes);
    arguments.values = Present(call, 2, call.Input(kRows + 5), arguments, size, kCacheBytes);
    if constexpr (kHasScales) {
      arguments.key_scales = static_cast<float*>(Present(call, 3, call.Input(kRows + 6), arguments, 1, 4));
      arguments.value_scales = static_cast<float*>(Present(call, 4, call.Input(kRows + 7), arguments, 1, 4));
    }
    const int64_t shape[] = {arguments.batch, arguments.tokens, heads_ * size};
    arguments.output = static_cast<float*>(call.Output(0, shape, std::size(shape)));
    if (rows.elements > 0) launcher_(arguments, call);
  }

 private:
  // The data of an input (B, S, size).
  static const float* Rows(const Tensor& tensor, const Arguments& arguments, int64_t size) {
    tensor.Expect({arguments.batch, arguments.tokens, size});
    return tensor.As<float>();
  }

  // The data of an output cache with rows of `size` elements, which begins as a copy of the past cache. The executor
  // binds the same memory to both; then there is nothing to copy.
  static void* Present(const Call& call, size_t index, const Tensor& past, const Arguments& arguments, int64_t size,
                       int64_t element_bytes) {
    past.Expect({arguments.batch, arguments.kv_heads, arguments.capacity, size});
    void* present = call.Output(index, past.shape, past.rank);
    if (present != past.data) Launcher::Copy(call, present, past.data, past.elements * element_bytes);
    return present;
  }

  int64_t heads_, kv_heads_, window_;
  Launcher launcher_;
};

}  // namespace healthgpt
