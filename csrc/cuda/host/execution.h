// CUDA's execution model for the host's C++ compiler: the same device code, run by fibers, one per thread of a block.
//
// A fiber runs until it meets others: at a barrier of its block, or in an exchange between the lanes of its warp. In
// between, the schedule decides who goes first, so what a missing barrier leaves to chance differs between schedules.
// docs/cuda.md says what this finds and what it cannot find.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}  // as CUDA's: counts convert
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};

// Of the fiber that runs.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace healthgpt::cuda::host {

// Which of the fibers that could go on goes on. In order or in reverse, blocks run one after another, and each of a
// block's warps as far as it gets. Shuffled, three blocks run at once, and warps have priorities that are drawn anew at
// every barrier: one that is called slow waits until nobody else can go on (Burckhardt et al., "A Randomized Scheduler
// with Probabilistic Guarantees of Finding Bugs", 2010).
enum class Order { kForward, kReverse, kShuffled };

struct Schedule {
  Order order = Order::kForward;
  uint32_t seed = 0;
};

// Faults that tests plant, to see that they are found. An empty name or -1 plants none.
struct Mutation {
  std::string drop_barrier;  // no thread stops at this one, "file:line" as BarriersMet names it
  int drop_block = -1;       // the n-th block of every launch does nothing
  int shift_threads = 0;     // threadIdx.x is so much too high
};

void SetSchedule(const Schedule& schedule);
void SetMutation(const Mutation& mutation);
// The barriers that threads have met since the last call.
std::vector<std::string> BarriersMet();

// Runs `kernel` once per thread. Throws std::logic_error where threads wait for each other in vain.
void Run(dim3 grid, dim3 block, const std::function<void()>& kernel);

void SyncThreads(const char* file, int line);
// The block's memory, poisoned when the block begins. A kernel asks for one size.
void* SharedMemory(size_t bytes);

constexpr int kWarp = 32;
constexpr size_t kMostExchanged = 32;

// Gives every lane what all lanes of its warp brought, until the lane's next exchange.
const unsigned char* Exchange(const void* brought, size_t bytes);

template <class Type>
struct Lanes {
  const unsigned char* slots;
  Type operator[](int lane) const {
    Type value;
    std::memcpy(&value, slots + static_cast<size_t>(lane) * kMostExchanged, sizeof(Type));
    return value;
  }
};

template <class Type>
Lanes<Type> Exchange(const Type& value) {
  static_assert(sizeof(Type) <= kMostExchanged);
  return {Exchange(&value, sizeof(Type))};
}

}  // namespace healthgpt::cuda::host
