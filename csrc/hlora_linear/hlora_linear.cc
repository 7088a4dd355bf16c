#include "hlora_linear/hlora_linear.h"

#include "hlora_linear/target_kernels.h"

namespace healthgpt {

void HLoraLinear(const HLoraLinearArguments& arguments, const Parallel& parallel, Target target) {
  static constexpr auto kKernels = TARGET_KERNELS(HLoraLinear);
  kKernels[target](arguments, parallel);
}

bool UsesAmx() {
#if defined(__x86_64__)
  return BestTarget() == Target::kAvx512 && MultipliesTilesAvx512();
#else
  return false;
#endif
}

}  // namespace healthgpt
