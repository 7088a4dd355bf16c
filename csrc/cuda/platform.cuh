// What a kernel asks of the machine it runs on: a GPU, or the host's fibers in its place. The only file that tells them
// apart but for numbers.cuh, tensor_cores.cuh and launch.cuh.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include <cmath>

#include "cuda/host/execution.h"
#endif

namespace healthgpt::cuda {

constexpr int kWarpSize = 32;

#ifdef __CUDACC__

// The block's shared memory: a struct of the kernel's. (Declared through a function, so that the host can poison it and
// know its end.)
template <class Type>
__device__ inline Type& Shared() {
  __shared__ __align__(16) unsigned char memory[sizeof(Type)];
  return *reinterpret_cast<Type*>(memory);
}

__device__ inline void SyncThreads() { __syncthreads(); }

template <class Type>
__device__ inline Type ShuffleXor(Type value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

template <class Type>
__device__ inline Type Shuffle(Type value, int lane) {
  return __shfl_sync(0xFFFFFFFFu, value, lane);
}

// One more, and how many there were. Who comes later sees what was written before, on the whole GPU.
__device__ inline int Arrive(int* counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
__device__ inline void AtomicAdd(uint64_t* at, uint64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
}
__device__ inline void AtomicMax(uint32_t* at, uint32_t value) { atomicMax(at, value); }

// Programmatic dependent launch (Hopper and later): a kernel may begin before the one ahead of it has ended. Before
// WaitForPrevious it may touch nothing that is written on the device, weights alone. After AllowNext the next may
// begin; that one's own wait still ends only when this kernel has. A kernel that allows before it has waited would let
// the next one overtake two: so it waits first, unless some of its blocks wait before it ends (hlora_linear/decode.cu).
__device__ inline void WaitForPrevious() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}
__device__ inline void AllowNext() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// Read once and not written while the kernel runs.
template <class Type>
__device__ inline Type LoadOnce(const void* at) {
  return __ldg(static_cast<const Type*>(at));
}
// What other blocks of this launch wrote, or a launch that this one overlaps: not from a cache that may be older.
template <class Type>
__device__ inline Type LoadFresh(const Type* at) {
  return __ldcg(at);
}

#else

template <class Type>
Type& Shared() {
  return *static_cast<Type*>(host::SharedMemory(sizeof(Type)));
}

// A barrier is named by where it stands, so that a test can drop it.
inline void SyncThreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::SyncThreads(file, line);
}

template <class Type>
Type ShuffleXor(Type value, int mask) {
  const int lane = static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarpSize);
  return host::Exchange(value)[lane ^ mask];
}

template <class Type>
Type Shuffle(Type value, int lane) {
  return host::Exchange(value)[lane];
}

inline int Arrive(int* counter) { return (*counter)++; }
inline void AtomicAdd(uint64_t* at, uint64_t value) { *at += value; }
inline void AtomicMax(uint32_t* at, uint32_t value) { *at = *at > value ? *at : value; }
inline void WaitForPrevious() {}
inline void AllowNext() {}

// Through the type itself, so that the sanitizers see the alignment that the device asks for.
template <class Type>
Type LoadOnce(const void* at) {
  struct alignas(sizeof(Type)) Aligned {
    Type value;
  };
  return static_cast<const Aligned*>(at)->value;
}
template <class Type>
Type LoadFresh(const Type* at) {
  return LoadOnce<Type>(at);
}

#endif

__device__ inline float WarpSum(float value) {
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += ShuffleXor(value, mask);
  return value;
}
__device__ inline float WarpMax(float value) {
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value = fmaxf(value, ShuffleXor(value, mask));
  return value;
}

// Whether this block is the last of `blocks` to come here: then it sees what the others wrote before. The counter is
// back at zero after that. All threads of the block call it; `shared` is one number of theirs.
__device__ inline bool IsLastBlock(int* counter, int blocks, int* shared, bool first_thread) {
  SyncThreads();
  if (first_thread) {  // for all of them: the barriers order what the others wrote before, and what they read after
    *shared = Arrive(counter);
    if (*shared == blocks - 1) *counter = 0;
  }
  SyncThreads();
  return *shared == blocks - 1;
}

__device__ inline int Least(int a, int b) { return a < b ? a : b; }
__device__ inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
__device__ inline int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace healthgpt::cuda
