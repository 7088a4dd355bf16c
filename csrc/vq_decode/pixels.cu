// The last steps to a picture: interleaving the phases of an upsampling, and levels of 8 bits.
#include "cuda/launch.cuh"
#include "vq_decode/cuda.h"
#include "vq_decode/dispatch.cuh"

namespace healthgpt::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 256;

// A warp copies one pixel of the image from its phase.
template <class Word>
__global__ void __launch_bounds__(kWarpSize* kWarps, 1)
    PhaseInterleaveKernel(PhaseInterleaveArguments given, int64_t words) {
  WaitForPrevious();
  AllowNext();
  const int64_t width = 2 * given.width, pixels = 2 * given.height * width;
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y, batch = blockIdx.y;
  if (pixel >= pixels) return;
  const int64_t row = pixel / width + 1, column = pixel % width + 1;
  const int64_t cell = (batch * (given.height + 1) + row / 2) * (given.width + 1) + column / 2;
  const Word* const from = static_cast<const Word*>(given.phases) + (4 * cell + 2 * (row % 2) + column % 2) * words;
  Word* const to = static_cast<Word*>(given.image) + (batch * pixels + pixel) * words;
  for (int64_t i = threadIdx.x; i < words; i += kWarpSize) to[i] = from[i];
}

template <class Number>
__global__ void __launch_bounds__(kThreads, 1) ImageLevelsKernel(ImageLevelsArguments given) {
  WaitForPrevious();
  AllowNext();
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= given.count) return;
  // fmaxf of NaN and a number is the number.
  const float value = fminf(fmaxf(ToFloat(static_cast<const Number*>(given.x)[at]), -1.0f), 1.0f);
  given.image[at] = static_cast<uint8_t>((value + 1.0f) / 2.0f * 255.0f);
}

}  // namespace

Status PhaseInterleave(const PhaseInterleaveArguments& given, Stream stream) {
  if (given.batch < 1 || given.height < 1 || given.width < 1 || given.channels < 1) {
    return "[phase_interleave] nothing to interleave";
  }
  return ForImages(given.storage, [&](auto number) -> Status {
    using Number = decltype(number);
    const Grid grid = {CeilDivide(4 * given.height * given.width, kWarps), given.batch};
    const dim3 block(kWarpSize, kWarps);
    const int64_t bytes = given.channels * static_cast<int64_t>(sizeof(Number));
    const auto address = reinterpret_cast<uintptr_t>(given.phases) | reinterpret_cast<uintptr_t>(given.image);
    if (bytes % 16 == 0 && address % 16 == 0) {
      return Launch(PhaseInterleaveKernel<uint4>, grid, block, stream, given, bytes / 16);
    }
    return Launch(PhaseInterleaveKernel<Number>, grid, block, stream, given, given.channels);
  });
}

Status ImageLevels(const ImageLevelsArguments& given, Stream stream) {
  if (given.count < 1) return "[image_levels] there is no picture";
  return ForImages(given.storage, [&](auto number) -> Status {
    const Grid grid = {CeilDivide(given.count, kThreads)};
    return Launch(ImageLevelsKernel<decltype(number)>, grid, dim3(kThreads), stream, given);
  });
}

}  // namespace healthgpt::cuda
