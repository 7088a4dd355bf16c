// Starts a kernel. Allocates nothing and waits for nothing, so that a launch can be captured in a CUDA graph.
#pragma once

#include <utility>

#include "cuda/platform.cuh"
#include "cuda/storage.h"

namespace healthgpt::cuda {

// The number of blocks of a launch. They stay 64-bit until Launch has checked them: CUDA's own 32 bits would drop the
// upper half of a larger number without a word.
struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

constexpr int64_t kMostBlocksX = INT32_MAX, kMostBlocksYZ = 65535;  // CUDA's limits

// The error of operands that no grid can cover, or null.
inline Status CheckGrid(const Grid& grid) {
  const bool fits = grid.x >= 1 && grid.x <= kMostBlocksX && grid.y >= 1 && grid.y <= kMostBlocksYZ && grid.z >= 1 &&
                    grid.z <= kMostBlocksYZ;
  return fits ? nullptr : "[launch] operands must fit into a grid of at most 2147483647 x 65535 x 65535 blocks";
}

inline dim3 Dimensions(const Grid& grid) {
  return {static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z)};
}

#ifdef __CUDACC__

// On Hopper and later the kernel may start before the previous one has ended (WaitForPrevious).
template <class... Parameters, class... Arguments>
Status Launch(void (*kernel)(Parameters...), Grid grid, dim3 block, Stream stream, Arguments&&... arguments) {
  if (const Status wrong = CheckGrid(grid)) return wrong;
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = Dimensions(grid);
  config.blockDim = block;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = major >= 9 ? 1 : 0;
  error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Turing (compute capability 7.5) is the only supported architecture whose tensor cores lack bfloat16.
inline bool HasBFloat16() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 8;
}

#else

template <class... Parameters, class... Arguments>
Status Launch(void (*kernel)(Parameters...), Grid grid, dim3 block, Stream, Arguments&&... arguments) {
  if (const Status wrong = CheckGrid(grid)) return wrong;
  host::Run(Dimensions(grid), block, [&] { kernel(arguments...); });
  return nullptr;
}

inline bool HasBFloat16() { return true; }

#endif

}  // namespace healthgpt::cuda
