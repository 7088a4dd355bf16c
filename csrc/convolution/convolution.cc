#include "convolution/convolution.h"

#include "convolution/target_kernels.h"

namespace healthgpt {

void Convolution(const ConvolutionArguments& arguments, const Parallel& parallel, Target target) {
  static constexpr auto kKernels = TARGET_KERNELS(Convolution);
  kKernels[target](arguments, parallel);
}

}  // namespace healthgpt
