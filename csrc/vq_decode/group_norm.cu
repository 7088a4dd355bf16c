// Group normalisation with swish. The first launch computes the moments of slabs of positions, with a warp per group;
// the last block of a picture combines the slabs in order (Chan et al., 1979). The second launch normalises.
#include "cuda/launch.cuh"
#include "vq_decode/cuda.h"
#include "vq_decode/dispatch.cuh"

namespace healthgpt::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kSlabPositions = 64;  // at least, where a picture has so many
constexpr int64_t kMostSlabs = 128;
constexpr int64_t kTilePositions = 32;  // normalised by one block

struct Moments {
  float count, mean, squares;  // squares: the sum of squared differences from the mean
};

struct Slabs {
  int64_t count, positions;
};

Slabs SlabsOf(const GroupNormArguments& given) {
  const int64_t wanted = CeilDivide(given.positions, kSlabPositions), most = wanted < kMostSlabs ? wanted : kMostSlabs;
  const int64_t positions = CeilDivide(given.positions, most);
  return {CeilDivide(given.positions, positions), positions};
}

// The moments of the union of two sets.
__device__ inline Moments Join(const Moments& a, const Moments& b) {
  const float count = a.count + b.count, share = b.count / count, difference = b.mean - a.mean;
  return {count, a.mean + difference * share, a.squares + b.squares + difference * difference * a.count * share};
}

template <class Number>
__global__ void __launch_bounds__(kWarpSize* kWarps, 1)
    GroupMomentsKernel(GroupNormArguments given, Slabs slabs, int* counters, float* moments, float* factors) {
  auto& arrived = Shared<int>();
  WaitForPrevious();
  AllowNext();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t batch = blockIdx.y, slab = blockIdx.x, size = given.channels / given.groups;
  const int64_t begin = slab * slabs.positions, end = Min(begin + slabs.positions, given.positions);
  const Number* const x = static_cast<const Number*>(given.x) + batch * given.positions * given.channels;
  float* const of_batch = moments + batch * given.groups * slabs.count * 2;  // (groups, slabs, 2)
  for (int64_t group = warp; group < given.groups; group += kWarps) {
    const Number* const first = x + begin * given.channels + group * size;
    const float shift = ToFloat(first[0]);
    float sum = 0.0f, squares = 0.0f;
    for (int64_t position = lane; position < end - begin; position += kWarpSize) {
      for (int64_t channel = 0; channel < size; ++channel) {
        const float difference = ToFloat(first[position * given.channels + channel]) - shift;
        sum += difference;
        squares += difference * difference;
      }
    }
    sum = WarpSum(sum);
    squares = WarpSum(squares);
    if (lane == 0) {
      const float mean = sum / static_cast<float>((end - begin) * size);
      of_batch[(group * slabs.count + slab) * 2] = shift + mean;
      of_batch[(group * slabs.count + slab) * 2 + 1] = squares - sum * mean;
    }
  }
  if (!IsLastBlock(counters + batch, static_cast<int>(slabs.count), &arrived, threadIdx.x == 0)) return;
  for (int64_t group = threadIdx.x; group < given.groups; group += kWarpSize * kWarps) {
    Moments all = {};
    for (int64_t i = 0; i < slabs.count; ++i) {
      const float* const at = of_batch + (group * slabs.count + i) * 2;
      const int64_t positions = Min(slabs.positions, given.positions - i * slabs.positions);
      all = Join(all, {static_cast<float>(positions * size), LoadFresh(at), LoadFresh(at + 1)});
    }
    factors[(batch * given.groups + group) * 2] = all.mean;
    factors[(batch * given.groups + group) * 2 + 1] = 1.0f / sqrtf(all.squares / all.count + given.epsilon);
  }
}

template <class Number>
__global__ void __launch_bounds__(kWarpSize* kWarps, 1)
    GroupNormKernel(GroupNormArguments given, const float* factors) {
  WaitForPrevious();
  AllowNext();
  const int64_t batch = blockIdx.y, size = given.channels / given.groups;
  const int64_t begin = blockIdx.x * kTilePositions, end = Min(begin + kTilePositions, given.positions);
  for (int64_t channel = threadIdx.x; channel < given.channels; channel += kWarpSize) {
    const float* const of_group = factors + (batch * given.groups + channel / size) * 2;
    const float mean = of_group[0], factor = of_group[1] * given.weight[channel], bias = given.bias[channel];
    for (int64_t position = begin + threadIdx.y; position < end; position += kWarps) {
      const int64_t at = (batch * given.positions + position) * given.channels + channel;
      const float value = (ToFloat(static_cast<const Number*>(given.x)[at]) - mean) * factor + bias;
      static_cast<Number*>(given.y)[at] = Round(given.swish ? value / (1.0f + expf(-value)) : value, Number());
    }
  }
}

// The workspace's layout, in floats from its start: counters, the groups' factors, the slabs' moments.
int64_t FactorsAt(const GroupNormArguments& given) { return CeilDivide(given.batch, 4) * 4; }
int64_t MomentsAt(const GroupNormArguments& given) { return FactorsAt(given) + 2 * given.batch * given.groups; }

}  // namespace

int64_t GroupNormWorkspaceBytes(const GroupNormArguments& given) {
  return 4 * (MomentsAt(given) + 2 * given.batch * given.groups * kMostSlabs);
}

Status GroupNorm(const GroupNormArguments& given, Stream stream) {
  if (given.batch < 1 || given.positions < 1 || given.groups < 1 || given.channels < given.groups ||
      given.channels % given.groups != 0) {
    return "[group_norm] channels must be a multiple of groups, and there must be positions";
  }
  if (given.workspace == nullptr || given.workspace_bytes < GroupNormWorkspaceBytes(given)) {
    return "[group_norm] the workspace is too small";
  }
  const Slabs slabs = SlabsOf(given);
  float* const memory = static_cast<float*>(given.workspace);
  float *const factors = memory + FactorsAt(given), *const moments = memory + MomentsAt(given);
  return ForImages(given.storage, [&](auto number) -> Status {
    using Number = decltype(number);
    const Status status = Launch(GroupMomentsKernel<Number>, Grid{slabs.count, given.batch}, dim3(kWarpSize * kWarps),
                                 stream, given, slabs, static_cast<int*>(given.workspace), moments, factors);
    if (status != nullptr) return status;
    const Grid grid = {CeilDivide(given.positions, kTilePositions), given.batch};
    return Launch(GroupNormKernel<Number>, grid, dim3(kWarpSize, kWarps), stream, given,
                  static_cast<const float*>(factors));
  });
}

}  // namespace healthgpt::cuda
