// One block per row, with its threads along the channels. A decode step has one row, a picture about a thousand.
#include "cuda/launch.cuh"
#include "cuda/numbers.cuh"
#include "gather_rows/cuda.h"

namespace healthgpt::cuda {
namespace {

constexpr int kThreads = 256;

template <class From, class To>
__global__ void __launch_bounds__(kThreads, 1) GatherRowsKernel(GatherRowsArguments given) {
  WaitForPrevious();
  AllowNext();
  const int64_t id = given.ids[blockIdx.x];
  const bool is_inside = id >= 0 && id < given.rows;
  const From* const from = static_cast<const From*>(given.table) + (is_inside ? id : 0) * given.channels;
  To* const to = static_cast<To*>(given.output) + blockIdx.x * given.channels;
  for (int64_t i = threadIdx.x; i < given.channels; i += kThreads) {
    to[i] = Round(is_inside ? ToFloat(from[i]) : NAN, To());
  }
}

}  // namespace

Status GatherRows(const GatherRowsArguments& given, Stream stream) {
  if (given.count < 1 || given.rows < 1 || given.channels < 1) return "[gather_rows] nothing to gather";
  const Grid grid = {given.count};
  const dim3 block(kThreads);
  switch (given.storage) {
    case Storage::kFloat32:
      return Launch(GatherRowsKernel<float, float>, grid, block, stream, given);
    case Storage::kFloat16:
      return Launch(given.widen ? GatherRowsKernel<Half, float> : GatherRowsKernel<Half, Half>, grid, block, stream,
                    given);
    case Storage::kBFloat16:
      return Launch(given.widen ? GatherRowsKernel<BFloat16, float> : GatherRowsKernel<BFloat16, BFloat16>, grid, block,
                    stream, given);
    default:
      return "[gather_rows] a table must be float32, float16 or bfloat16";
  }
}

}  // namespace healthgpt::cuda
