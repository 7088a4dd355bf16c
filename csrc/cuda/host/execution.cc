#include "cuda/host/execution.h"

#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace healthgpt::cuda::host {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr unsigned char kPoison = 0xFF;  // NaN in every floating-point type

enum class State { kReady, kAtBarrier, kInExchange, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* sanitizer_state = nullptr;
  State state = State::kDone;
  dim3 index;
  int barriers = 0;
  int exchanges = 0;
};

// What the lanes of a warp brought to their last two exchanges: none is overwritten before all have read it.
struct Warp {
  unsigned char slots[2][kWarp][kMostExchanged];
  size_t bytes[kWarp];
};

Schedule schedule;
Mutation mutation;
int most_barriers = 0;

std::vector<std::unique_ptr<Fiber>> fibers;  // kept between launches
std::vector<Warp> warps;
std::mt19937 random_bits;
ucontext_t scheduler;
const void* scheduler_stack = nullptr;
size_t scheduler_bytes = 0;
const std::function<void()>* running_kernel = nullptr;
size_t current = 0;
std::unique_ptr<unsigned char[]> shared;
size_t shared_bytes = 0;

// The sanitizer has to know whose stack it looks at.
void BeginSwitch([[maybe_unused]] void** kept, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(kept, stack, bytes);
#endif
}
void EndSwitch([[maybe_unused]] void* kept, [[maybe_unused]] const void** from, [[maybe_unused]] size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(kept, from, bytes);
#endif
}

void Pause(State state) {
  Fiber& self = *fibers[current];
  self.state = state;
  BeginSwitch(&self.sanitizer_state, scheduler_stack, scheduler_bytes);
  swapcontext(&self.context, &scheduler);
  EndSwitch(self.sanitizer_state, nullptr, nullptr);
}

// A fiber outlives a block: it waits to be given another thread to be.
void RunThreads() {
  EndSwitch(nullptr, &scheduler_stack, &scheduler_bytes);
  for (;;) {
    (*running_kernel)();
    Pause(State::kDone);
  }
}

void Resume(size_t thread) {
  Fiber& fiber = *fibers[thread];
  current = thread;
  threadIdx = fiber.index;
  threadIdx.x += static_cast<unsigned>(mutation.shift_threads);
  void* kept = nullptr;
  BeginSwitch(&kept, fiber.stack.get(), kStackBytes);
  swapcontext(&scheduler, &fiber.context);
  EndSwitch(kept, nullptr, nullptr);
}

void MakeFibers(size_t count) {
  while (fibers.size() < count) {
    fibers.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers.back();
    fiber.stack = std::make_unique<char[]>(kStackBytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context, RunThreads, 0);
  }
}

void Arrange(std::vector<size_t>& indices) {
  if (schedule.order == Order::kReverse) std::reverse(indices.begin(), indices.end());
  if (schedule.order == Order::kShuffled) std::shuffle(indices.begin(), indices.end(), random_bits);
}

std::vector<size_t> Arranged(size_t count) {
  std::vector<size_t> indices(count);
  for (size_t i = 0; i < count; ++i) indices[i] = i;
  Arrange(indices);
  return indices;
}

[[noreturn]] void Fail(const std::string& message) {
  fibers.clear();  // they stand in the middle of a kernel
  throw std::logic_error("[cuda host] " + message + " in block " + std::to_string(blockIdx.x) + ", " +
                         std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z));
}

// Lets the lanes of a warp go on where all of them are in one exchange. Returns whether any can go on.
bool Release(size_t warp) {
  Fiber* const* lanes = nullptr;
  std::vector<Fiber*> of_warp;
  for (size_t lane = 0; lane < kWarp; ++lane) of_warp.push_back(fibers[warp * kWarp + lane].get());
  lanes = of_warp.data();
  const auto in = [&](State state) {
    return std::count_if(lanes, lanes + kWarp, [&](const Fiber* lane) { return lane->state == state; });
  };
  if (in(State::kInExchange) == kWarp) {
    for (size_t lane = 1; lane < kWarp; ++lane) {
      if (warps[warp].bytes[lane] != warps[warp].bytes[0]) Fail("lanes of a warp are in different exchanges");
    }
    for (size_t lane = 0; lane < kWarp; ++lane) lanes[lane]->state = State::kReady;
  }
  return in(State::kReady) > 0;
}

// One step of a warp: every lane that can goes on to where it next meets others.
void Advance(size_t warp) {
  for (size_t lane : Arranged(kWarp)) {
    const size_t thread = warp * kWarp + lane;
    if (fibers[thread]->state == State::kReady) Resume(thread);
  }
}

// Every warp as far as it gets; shuffled, one step of any of them at a time.
void AdvanceToBarrier(size_t count) {
  std::vector<size_t> ready = Arranged(count);
  while (!ready.empty()) {
    if (schedule.order == Order::kShuffled) Arrange(ready);
    if (Release(ready.front())) {
      Advance(ready.front());
    } else {
      ready.erase(ready.begin());
    }
  }
}

void RunBlock(dim3 block, size_t threads) {
  shared.reset();
  shared_bytes = 0;
  for (size_t thread = 0; thread < threads; ++thread) {
    Fiber& fiber = *fibers[thread];
    const auto at = static_cast<unsigned>(thread);
    fiber.index = dim3(at % block.x, at / block.x % block.y, at / (block.x * block.y));
    fiber.state = State::kReady;
    fiber.barriers = fiber.exchanges = 0;
  }
  for (;;) {
    AdvanceToBarrier(threads / kWarp);
    size_t waiting = 0, done = 0;
    for (size_t thread = 0; thread < threads; ++thread) {
      waiting += fibers[thread]->state == State::kAtBarrier ? 1 : 0;
      done += fibers[thread]->state == State::kDone ? 1 : 0;
    }
    if (done == threads) break;
    if (waiting != threads) {
      Fail(std::to_string(waiting) + " of " + std::to_string(threads) + " threads wait at a barrier, " +
           std::to_string(done) + " are done");
    }
    for (size_t thread = 0; thread < threads; ++thread) fibers[thread]->state = State::kReady;
  }
  for (size_t thread = 0; thread < threads; ++thread) most_barriers = std::max(most_barriers, fibers[thread]->barriers);
}

}  // namespace

void SetSchedule(const Schedule& given) { schedule = given; }
void SetMutation(const Mutation& given) { mutation = given; }
int BarriersMet() { return std::exchange(most_barriers, 0); }

void SyncThreads() {
  Fiber& self = *fibers[current];
  if (self.barriers++ == mutation.drop_barrier) return;
  Pause(State::kAtBarrier);
}

void* SharedMemory(size_t bytes) {
  if (shared == nullptr) {
    shared.reset(new unsigned char[bytes]);  // of this size exactly: the sanitizer knows its end
    std::memset(shared.get(), kPoison, bytes);
    shared_bytes = bytes;
  }
  return bytes == shared_bytes ? shared.get() : nullptr;
}

const unsigned char* Exchange(const void* brought, size_t bytes) {
  Fiber& self = *fibers[current];
  Warp& warp = warps[current / kWarp];
  auto& slots = warp.slots[self.exchanges++ % 2];
  std::memcpy(slots[current % kWarp], brought, bytes);
  warp.bytes[current % kWarp] = bytes;
  Pause(State::kInExchange);
  return slots[0];
}

void Run(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  const size_t threads = static_cast<size_t>(block.x) * block.y * block.z;
  const size_t blocks = static_cast<size_t>(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || threads % kWarp != 0 || blocks == 0) {
    throw std::logic_error("[cuda host] a block must have 32 to 1024 threads in whole warps, and a grid blocks");
  }
  MakeFibers(threads);
  warps.resize(threads / kWarp);
  running_kernel = &kernel;
  random_bits.seed(schedule.seed);
  blockDim = block;
  gridDim = grid;
  for (size_t index : Arranged(blocks)) {
    if (static_cast<int64_t>(index) == mutation.drop_block) continue;
    const auto at = static_cast<unsigned>(index);
    blockIdx = dim3(at % grid.x, at / grid.x % grid.y, at / (grid.x * grid.y));
    RunBlock(block, threads);
  }
  shared.reset();
}

}  // namespace healthgpt::cuda::host
