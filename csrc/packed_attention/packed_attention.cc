#include "packed_attention/packed_attention.h"

#include "packed_attention/target_kernels.h"

namespace healthgpt {

void PackedAttention(const PackedAttentionArguments& arguments, const Parallel& parallel, Target target) {
  static constexpr auto kKernels = TARGET_KERNELS(PackedAttention);
  kKernels[target](arguments, parallel);
}

}  // namespace healthgpt
