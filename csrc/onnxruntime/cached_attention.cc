// The nodes CachedAttention and PackedCachedAttention on the CPU, by the launcher cached_attention.h.
#include "cached_attention/cached_attention.h"

#include <cstring>

#include "onnxruntime/attention_node.h"
#include "onnxruntime/kernels.h"

namespace healthgpt {
namespace {

template <Storage storage>
struct CpuAttention {
  using Arguments = CachedAttentionArguments;
  static constexpr Storage kStorage = storage;

  static void CheckLengths(const Tensor& past_length, const Arguments& arguments) {
    for (int64_t sequence = 0; sequence < arguments.batch; ++sequence) {
      const int64_t length = past_length.As<int64_t>()[sequence];
      if (length < 0 || length > arguments.capacity - arguments.tokens) {
        throw std::invalid_argument("past_length must be from 0 to " + std::to_string(arguments.capacity) +
                                    " positions less " + std::to_string(arguments.tokens) + " new ones, found " +
                                    std::to_string(length));
      }
    }
  }

  static void Copy(const Call&, void* to, const void* from, int64_t bytes) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }

  void operator()(const Arguments& arguments, Call& call) const { CachedAttention(arguments, call.Threads()); }
};

}  // namespace

std::vector<const OrtCustomOp*> CachedAttentionOperators() {
  using Floats = CpuAttention<Storage::kFloat32>;
  using Halves = CpuAttention<Storage::kFloat16>;
  using Bytes = CpuAttention<Storage::kInt8>;
  return {Operator<CachedAttentionKernel<Floats>>(), Operator<CachedAttentionKernel<Floats, true>>(),
          Operator<CachedAttentionKernel<Halves>>(), Operator<CachedAttentionKernel<Halves, true>>(),
          Operator<CachedAttentionKernel<Bytes>>(),  Operator<CachedAttentionKernel<Bytes, true>>()};
}

}  // namespace healthgpt
