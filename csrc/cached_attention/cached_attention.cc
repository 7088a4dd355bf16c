#include "cached_attention/cached_attention.h"

#include "cached_attention/target_kernels.h"

namespace healthgpt {

void CachedAttention(const CachedAttentionArguments& arguments, const Parallel& parallel, Target target) {
  static constexpr auto kKernels = TARGET_KERNELS(CachedAttention);
  kKernels[target](arguments, parallel);
}

}  // namespace healthgpt
