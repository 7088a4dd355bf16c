// The operations that kernels need from their machine: a GPU, or fibers on the host in its place (cuda/host). Kernels
// are the same source for both; only this file, numbers.cuh, tensor_cores.cuh and launch.cuh differ.
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

// The block's shared memory, as a struct of the kernel. It is declared through a function so that the host can poison
// it and know where it ends.
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

// Increments the counter and returns its value before. Release and acquire on the whole GPU: what was written before
// one block's call is visible after a later call of another.
__device__ inline int Arrive(int* counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
__device__ inline void AtomicAdd(uint64_t* at, uint64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
}
__device__ inline void AtomicMax(uint32_t* at, uint32_t value) { atomicMax(at, value); }

// e^x and a / b, wrong by a few units in the last place: a decode step would wait for the exact ones.
__device__ inline float FastExp(float x) { return __expf(x); }
__device__ inline float FastDivide(float a, float b) { return __fdividef(a, b); }

// Programmatic dependent launch (Hopper and later): a kernel may start before the previous one has ended. Before
// WaitForPrevious it may read only memory that no kernel writes, such as weights. AllowNext lets the next kernel start;
// the next kernel's WaitForPrevious still returns only after this kernel has ended. A kernel must wait before it allows
// the next one, which could otherwise overtake two kernels. The exception is a kernel some of whose blocks wait before
// it ends (hlora_linear/decode.cu).
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

// A load of memory that is not written while the kernel runs.
template <class Type>
__device__ inline Type LoadOnce(const void* at) {
  return __ldg(static_cast<const Type*>(at));
}
// A load of memory that other blocks of this launch, or of an overlapping one, have written. It bypasses the L1 cache,
// whose copy may be old.
template <class Type>
__device__ inline Type LoadFresh(const Type* at) {
  return __ldcg(at);
}

#else

template <class Type>
Type& Shared() {
  return *static_cast<Type*>(host::SharedMemory(sizeof(Type)));
}

// A barrier is named by its place in the source, so that a test can drop it.
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
inline float FastExp(float x) { return expf(x); }
inline float FastDivide(float a, float b) { return a / b; }
inline void WaitForPrevious() {}
inline void AllowNext() {}

// Through an aligned type, so that the sanitizers check the alignment that the device needs.
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

// Whether this block is the last of `blocks` blocks to call this. The last one sees everything that the others wrote
// before their calls, and sets the counter back to zero. All threads of a block must call it; `shared` is in shared
// memory.
__device__ inline bool IsLastBlock(int* counter, int blocks, int* shared, bool first_thread) {
  SyncThreads();
  if (first_thread) {  // one thread arrives for the block: the barriers order the writes before and the reads after
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
