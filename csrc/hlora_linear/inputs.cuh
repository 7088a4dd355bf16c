// The inputs of the products, four channels of a row at a time: x, or z multiplied by the router's gates.
//
// An input is loaded some time before it is needed. Wait() until it is written, Load() it, Prepare() the data that the
// block shares, then get the Values() of what was loaded. All threads of a block must call Wait and Prepare.
#pragma once

#include "cuda/platform.cuh"
#include "hlora_linear/cuda.h"

namespace healthgpt::cuda {

// Four numbers; of a pair also the four numbers that these gate.
struct Loaded {
  float4 first, second;
};

// Loads number by number what cannot be loaded at once: `left` numbers, at most four, then zeros.
template <class Load>
__device__ inline float4 GatherFour(int left, const Load& load) {
  float4 four = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1  // rarely used: it must not take registers from the usual path
  for (int i = 3; i >= 0; --i) four = {i < left ? load(i) : 0.0f, four.x, four.y, four.z};
  return four;
}

// Four numbers, or `left` if a row ends before, then zeros. Aligned rows end after whole fours.
__device__ inline float4 LoadFour(const float* at, int left, bool is_aligned) {
  if (is_aligned && left > 0) return LoadFresh(reinterpret_cast<const float4*>(at));
  return GatherFour(left, [&](int i) { return LoadFresh(at + i); });
}

__device__ inline void StoreFour(float* at, const float4& four, int left, bool is_aligned) {
  if (is_aligned) {
    *reinterpret_cast<float4*>(at) = four;
    return;
  }
  at[0] = four.x;
  if (left > 1) at[1] = four.y;
  if (left > 2) at[2] = four.z;
  if (left > 3) at[3] = four.w;
}

__device__ inline float SiluGate(float gate, float up) { return FastDivide(gate, 1.0f + FastExp(-gate)) * up; }

// x (rows, channels), or for pairs silu(x[:, :channels]) * x[:, channels:].
struct PlainInput {
  const float* x = nullptr;
  int rows = 0, channels = 0, stride = 0;
  bool is_pair = false, is_aligned = false;
  bool waits = false;  // whether the previous launch may have written it

  __device__ void Wait() const {
    if (!waits) return;
    WaitForPrevious();
    AllowNext();  // x is written, also for the next launch
  }
  __device__ void Prepare() const {}

  __device__ Loaded Load(int row, int channel) const {
    Loaded loaded = {};
    if (row >= rows || channel >= channels) return loaded;
    const float* const at = x + static_cast<unsigned>(row * stride + channel);
    loaded.first = LoadFour(at, channels - channel, is_aligned);
    if (is_pair) loaded.second = LoadFour(at + channels, channels - channel, is_aligned);
    return loaded;
  }
  __device__ void Values(const Loaded& loaded, int, int, float (&values)[4]) const {
    const float4 first = loaded.first, second = loaded.second;
    values[0] = first.x, values[1] = first.y, values[2] = first.z, values[3] = first.w;
    if (!is_pair) return;
    values[0] = SiluGate(values[0], second.x);
    values[1] = SiluGate(values[1], second.y);
    values[2] = SiluGate(values[2], second.z);
    values[3] = SiluGate(values[3], second.w);
  }
};

// The gates of a block's rows, in shared memory.
template <int kRows>
struct Gates {
  float routes[kRows][kMostExperts];
  float shares[kRows][kMostExperts];
};

// z (rows, rank + experts), whose last columns are the routes, and what its gates are made of.
struct Gating {
  const float* low = nullptr;           // z
  const float* inverse_norm = nullptr;  // (rows) or null: for the routes, if z comes from x without its norm
  const float* route_bias = nullptr;    // (experts) or null
  const int32_t* expert_of = nullptr;   // (rank) or null for equal shares
  int rank = 0, experts = 0;
  int stride = 0;           // of z
  int columns = 0;          // of each expert, for equal shares
  bool is_aligned = false;  // z may be loaded four numbers at a time
  bool four_share = false;  // four columns that are loaded at once are one expert's
};

// gate * z (rows, rank)
template <int kRows>
struct GatedInput : Gating {
  int rows = 0, first_row = 0;  // all rows; the block's first row
  Gates<kRows>* gates = nullptr;

  __device__ void Wait() const { WaitForPrevious(); }

  // The softmax of every row's routes.
  __device__ void Prepare() const {
    const int thread = static_cast<int>(threadIdx.x + blockDim.x * threadIdx.y);
    const int threads = static_cast<int>(blockDim.x * blockDim.y);
    const int count = Least(rows - first_row, kRows) * experts;
    for (int i = thread; i < count; i += threads) {
      const int row = i / experts, expert = i % experts;
      float route = LoadFresh(low + static_cast<unsigned>((first_row + row) * stride + rank + expert));
      if (inverse_norm != nullptr) route *= LoadFresh(inverse_norm + first_row + row);
      if (route_bias != nullptr) route += LoadOnce<float>(route_bias + expert);
      gates->routes[row][expert] = route;
    }
    SyncThreads();
    for (int i = thread; i < count; i += threads) {
      const float* const routes = gates->routes[i / experts];
      float largest = routes[0], sum = 0.0f;
      for (int expert = 1; expert < experts; ++expert) largest = fmaxf(largest, routes[expert]);
      for (int expert = 0; expert < experts; ++expert) sum += FastExp(routes[expert] - largest);
      gates->shares[i / experts][i % experts] = FastDivide(FastExp(routes[i % experts] - largest), sum);
    }
    SyncThreads();
  }

  __device__ Loaded Load(int row, int channel) const {
    Loaded loaded = {};
    if (row >= rows || channel >= rank) return loaded;
    loaded.first = LoadFour(low + static_cast<unsigned>(row * stride + channel), rank - channel, is_aligned);
    return loaded;
  }
  __device__ void Values(const Loaded& loaded, int row, int channel, float (&values)[4]) const {
    values[0] = loaded.first.x, values[1] = loaded.first.y, values[2] = loaded.first.z, values[3] = loaded.first.w;
    if (row >= rows || channel >= rank) return;  // zeros
    const float* const shares = gates->shares[row - first_row];
    if (four_share) {
      const float share = shares[channel / columns];
      for (float& value : values) value *= share;
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int here = Least(channel + i, rank - 1);
      values[i] *= shares[expert_of == nullptr ? here / columns : LoadOnce<int32_t>(expert_of + here)];
    }
  }
};

}  // namespace healthgpt::cuda
