#include "hlora_linear/hlora_linear.h"

#include "hlora_linear/target_kernels.h"

namespace healthgpt {

void HLoraLinear(const HLoraLinearArguments& arguments, const Parallel& parallel, Target target) {
  static constexpr auto kKernels = TARGET_KERNELS(HLoraLinear);
  kKernels[target](arguments, parallel);
}

}  // namespace healthgpt
