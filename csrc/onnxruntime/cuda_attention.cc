// The nodes CachedAttention and PackedCachedAttention on a GPU, by cached_attention/pass.h.
#include "cached_attention/pass.h"
#include "onnxruntime/attention_node.h"
#include "onnxruntime/cuda.h"

namespace healthgpt {
namespace {

template <cuda::Storage storage>
class CudaAttention {
 public:
  using Arguments = cuda::CachedAttentionArguments;
  static constexpr cuda::Storage kStorage = storage;

  // The lengths are on the GPU, so that a captured graph reads new ones. The executor keeps them within the caches.
  static void CheckLengths(const Tensor&, const Arguments&) {}

  static void Copy(const Call& call, void* to, const void* from, int64_t bytes) {
    Raise(cuda::Copy(to, from, bytes, StreamOf(call)));
  }

  void operator()(const Arguments& arguments, Call& call) const {
    Raise(cuda::CachedAttentionPass(arguments, *workspaces_, StreamOf(call)));
  }

 private:
  std::shared_ptr<cuda::Workspaces> workspaces_ = cuda::Workspaces::Get();
};

}  // namespace

std::vector<const OrtCustomOp*> CudaCachedAttentionOperators() {
  using Halves = CudaAttention<cuda::Storage::kFloat16>;
  using Bytes = CudaAttention<cuda::Storage::kInt8>;
  return {Operator<CachedAttentionKernel<Halves>>(), Operator<CachedAttentionKernel<Halves, true>>(),
          Operator<CachedAttentionKernel<Bytes>>(), Operator<CachedAttentionKernel<Bytes, true>>()};
}

}  // namespace healthgpt
