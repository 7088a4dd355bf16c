// CUDA's execution model on the host: the same device code, run by fibers, one per thread of a block.
//
// A fiber runs until it reaches a barrier of its block or an exchange between the lanes of its warp. A schedule decides
// which fiber runs next. If a barrier is missing, different schedules therefore give different results. docs/cuda.md
// says what this finds and what it cannot find.
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
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}  // implicit, like CUDA's
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

// The values for the fiber that runs now.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace healthgpt::cuda::host {

// Which of the fibers that can run does run. With kForward and kReverse, blocks run one after another, and each warp of
// a block runs as far as it can. With kShuffled, three blocks run at once, and warps get new random priorities at every
// barrier. A warp drawn as slow waits until no other can run (Burckhardt et al., "A Randomized Scheduler with
// Probabilistic Guarantees of Finding Bugs", 2010).
enum class Order { kForward, kReverse, kShuffled };

struct Schedule {
  Order order = Order::kForward;
  uint32_t seed = 0;
};

// Faults that tests plant, to check that they are found. The default values plant none.
struct Mutation {
  std::string drop_barrier;  // the barrier at which no thread stops, "file:line" as in BarriersMet
  int drop_block = -1;       // the block of every launch that does nothing
  int shift_threads = 0;     // added to threadIdx.x
};

void SetSchedule(const Schedule& schedule);
void SetMutation(const Mutation& mutation);
// The barriers that threads have reached since the last call.
std::vector<std::string> BarriersMet();

// Runs `kernel` once per thread. Throws std::logic_error if threads wait for each other forever.
void Run(dim3 grid, dim3 block, const std::function<void()>& kernel);

void SyncThreads(const char* file, int line);
// The block's shared memory, poisoned when the block starts. A kernel must always ask for the same size.
void* SharedMemory(size_t bytes);

constexpr int kWarp = 32;
constexpr size_t kMostExchanged = 32;

// Collects a value from every lane of the warp and gives all of them to each lane. They stay valid until the lane's
// next exchange.
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
