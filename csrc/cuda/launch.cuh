// Starts a kernel. Allocates nothing and waits for nothing, so that a launch can be captured in a CUDA graph.
#pragma once

#include <utility>

#include "cuda/platform.cuh"
#include "cuda/storage.h"

namespace healthgpt::cuda {

#ifdef __CUDACC__

// On Hopper and later the kernel may begin before the one ahead of it ends (WaitForPrevious).
template <class... Parameters, class... Arguments>
Status Launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Stream stream, Arguments&&... arguments) {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = major >= 9 ? 1 : 0;
  error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Turing (compute capability 7.5) is the only supported one without bfloat16 in its tensor cores.
inline bool HasBFloat16() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 8;
}

#else

template <class... Parameters, class... Arguments>
Status Launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Stream, Arguments&&... arguments) {
  host::Run(grid, block, [&] { kernel(arguments...); });
  return nullptr;
}

inline bool HasBFloat16() { return true; }

#endif

}  // namespace healthgpt::cuda
