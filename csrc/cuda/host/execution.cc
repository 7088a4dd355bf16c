#include "cuda/host/execution.h"

#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <set>
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
constexpr size_t kBlocksAtOnce = 3;      // in a shuffled schedule
constexpr uint32_t kSlowWarps = 16;      // one warp of this many is slow
constexpr unsigned char kPoison = 0xFF;  // NaN in every floating-point type

enum class State { kReady, kAtBarrier, kInExchange, kDone };

// Where a paused fiber continues, for __builtin_setjmp: the C library's swapcontext makes a system call every time.
using Place = void* [5];

struct Fiber {
  ucontext_t beginning;
  Place place;
  bool has_begun = false;
  std::unique_ptr<char[]> stack;
  void* sanitizer_state = nullptr;
  State state = State::kDone;
  dim3 index;
  int exchanges = 0;
};

struct Warp {
  // The values of the last two exchanges. Two, so that no value is overwritten before all lanes have read it.
  unsigned char slots[2][kWarp][kMostExchanged];
  size_t bytes[kWarp];
  uint32_t priority = 0;
};

// A block that runs, with the first of its fibers and of its warps.
struct Slot {
  size_t first_fiber, first_warp;
  dim3 index;
  std::unique_ptr<unsigned char[]> shared;
  size_t shared_bytes = 0;
  bool is_running = false;
};

Schedule schedule;
Mutation mutation;
std::set<std::string> barriers_met;

std::vector<std::unique_ptr<Fiber>> fibers;  // kept between launches
std::vector<Warp> warps;
std::vector<Slot> slots;
size_t block_threads = 0, block_warps = 0;
std::mt19937 random_bits;
Place scheduler;
const void* scheduler_stack = nullptr;
size_t scheduler_bytes = 0;
const std::function<void()>* running_kernel = nullptr;
size_t current = 0;

// The address sanitizer must be told about every change of stacks.
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

// Functions of their own, because GCC wants setjmp and longjmp in different functions, and a call preserves the
// caller's registers. They are not instrumented: at a jump the address sanitizer would forget the bounds of everything
// on the stack.
#define SWITCH __attribute__((noinline, no_sanitize("address", "undefined"))) void
SWITCH Enter(Place& from, const ucontext_t& beginning) {
  if (__builtin_setjmp(from) == 0) setcontext(&beginning);
}
SWITCH Jump(Place& to) { __builtin_longjmp(to, 1); }
SWITCH Switch(Place& from, Place& to) {
  if (__builtin_setjmp(from) == 0) Jump(to);
}

void Pause(State state) {
  Fiber& self = *fibers[current];
  self.state = state;
  BeginSwitch(&self.sanitizer_state, scheduler_stack, scheduler_bytes);
  Switch(self.place, scheduler);
  EndSwitch(self.sanitizer_state, nullptr, nullptr);
}

// A fiber outlives its block: after the kernel it pauses until it is resumed as a thread of another block.
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
  if (std::exchange(fiber.has_begun, true)) {
    Switch(scheduler, fiber.place);
  } else {
    Enter(scheduler, fiber.beginning);
  }
  EndSwitch(kept, nullptr, nullptr);
}

void MakeFibers(size_t count) {
  while (fibers.size() < count) {
    fibers.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers.back();
    fiber.stack = std::make_unique<char[]>(kStackBytes);
    getcontext(&fiber.beginning);
    fiber.beginning.uc_stack.ss_sp = fiber.stack.get();
    fiber.beginning.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.beginning, RunThreads, 0);
  }
}

std::vector<size_t> Arranged(size_t count) {
  std::vector<size_t> indices(count);
  for (size_t i = 0; i < count; ++i) indices[i] = i;
  if (schedule.order == Order::kReverse) std::reverse(indices.begin(), indices.end());
  if (schedule.order == Order::kShuffled) std::shuffle(indices.begin(), indices.end(), random_bits);
  return indices;
}

[[noreturn]] void Fail(const std::string& message) {
  fibers.clear();  // they are paused inside a kernel and cannot be reused
  throw std::logic_error("[cuda host] " + message + " in block " + std::to_string(blockIdx.x) + ", " +
                         std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z));
}

// Whether a warp can run. From an exchange it can once all its lanes are there.
bool CanGoOn(size_t warp) {
  const auto lane = [&](size_t i) -> Fiber& { return *fibers[warp * kWarp + i]; };
  size_t exchanging = 0;
  for (size_t i = 0; i < kWarp; ++i) {
    if (lane(i).state == State::kReady) return true;
    exchanging += lane(i).state == State::kInExchange ? 1 : 0;
  }
  if (exchanging != kWarp) return false;
  for (size_t i = 0; i < kWarp; ++i) {
    if (warps[warp].bytes[i] != warps[warp].bytes[0]) Fail("lanes of a warp are in different exchanges");
    lane(i).state = State::kReady;
  }
  return true;
}

// One step of a warp: every lane that can run does, up to its next barrier or exchange.
void Advance(const Slot& slot, size_t warp) {
  blockIdx = slot.index;
  for (size_t lane : Arranged(kWarp)) {
    const size_t thread = warp * kWarp + lane;
    if (fibers[thread]->state == State::kReady) Resume(thread);
  }
}

void DrawPriorities(const Slot& slot) {
  uint32_t rank = 0;
  for (size_t i : Arranged(block_warps)) {
    const bool is_slow = schedule.order == Order::kShuffled && random_bits() % kSlowWarps == 0;
    const uint32_t drawn = schedule.order == Order::kShuffled ? random_bits() / 2 : ++rank;
    warps[slot.first_warp + i].priority = drawn | (is_slow ? 0x80000000u : 0u);
  }
}

void Begin(Slot& slot, dim3 index) {
  slot.index = index;
  slot.shared.reset();
  slot.is_running = true;
  for (size_t thread = 0; thread < block_threads; ++thread) {
    Fiber& fiber = *fibers[slot.first_fiber + thread];
    const auto at = static_cast<unsigned>(thread);
    fiber.index = dim3(at % blockDim.x, at / blockDim.x % blockDim.y, at / (blockDim.x * blockDim.y));
    fiber.state = State::kReady;
    fiber.exchanges = 0;
  }
  DrawPriorities(slot);
}

// Called when no warp of a block can run: all threads pass their barrier, or all are done.
void MeetOrEnd(Slot& slot) {
  size_t waiting = 0, done = 0;
  for (size_t i = 0; i < block_threads; ++i) {
    const Fiber& fiber = *fibers[slot.first_fiber + i];
    waiting += fiber.state == State::kAtBarrier ? 1 : 0;
    done += fiber.state == State::kDone ? 1 : 0;
  }
  if (done == block_threads) {
    slot.is_running = false;
    return;
  }
  if (waiting != block_threads) {
    blockIdx = slot.index;
    Fail(std::to_string(waiting) + " of " + std::to_string(block_threads) + " threads wait at a barrier, " +
         std::to_string(done) + " are done");
  }
  for (size_t i = 0; i < block_threads; ++i) fibers[slot.first_fiber + i]->state = State::kReady;
  DrawPriorities(slot);
}

// One step of the warp with the best priority that can run. A block whose warps all wait passes its barrier at once,
// however far the other blocks are.
void Step() {
  const Slot* chosen_slot = nullptr;
  size_t chosen = 0;
  for (Slot& slot : slots) {
    bool any = false;
    for (size_t warp = slot.first_warp; slot.is_running && warp < slot.first_warp + block_warps; ++warp) {
      if (!CanGoOn(warp)) continue;
      any = true;
      if (chosen_slot != nullptr && warps[warp].priority >= warps[chosen].priority) continue;
      chosen_slot = &slot;
      chosen = warp;
    }
    if (slot.is_running && !any) return MeetOrEnd(slot);
  }
  if (chosen_slot != nullptr) Advance(*chosen_slot, chosen);
}

}  // namespace

void SetSchedule(const Schedule& given) { schedule = given; }
void SetMutation(const Mutation& given) { mutation = given; }

std::vector<std::string> BarriersMet() {
  const std::set<std::string> met = std::exchange(barriers_met, {});
  return {met.begin(), met.end()};
}

void SyncThreads(const char* file, int line) {
  if (threadIdx.x == 0 || !mutation.drop_barrier.empty()) {
    const std::string name = std::string(file) + ":" + std::to_string(line);
    if (name == mutation.drop_barrier) return;
    barriers_met.insert(name);
  }
  Pause(State::kAtBarrier);
}

void* SharedMemory(size_t bytes) {
  Slot& slot = slots[current / block_threads];
  if (slot.shared == nullptr) {
    slot.shared.reset(new unsigned char[bytes]);  // exactly this size, so that the sanitizer knows the end
    std::memset(slot.shared.get(), kPoison, bytes);
    slot.shared_bytes = bytes;
  }
  return bytes == slot.shared_bytes ? slot.shared.get() : nullptr;
}

const unsigned char* Exchange(const void* brought, size_t bytes) {
  Fiber& self = *fibers[current];
  Warp& warp = warps[current / kWarp];
  auto& brought_by = warp.slots[self.exchanges++ % 2];
  std::memcpy(brought_by[current % kWarp], brought, bytes);
  warp.bytes[current % kWarp] = bytes;
  Pause(State::kInExchange);
  return brought_by[0];
}

void Run(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  block_threads = static_cast<size_t>(block.x) * block.y * block.z;
  block_warps = block_threads / kWarp;
  const size_t blocks = static_cast<size_t>(grid.x) * grid.y * grid.z;
  if (block_threads == 0 || block_threads > 1024 || block_threads % kWarp != 0 || blocks == 0) {
    throw std::logic_error("[cuda host] a block must have 32 to 1024 threads in whole warps, and a grid blocks");
  }
  slots.clear();
  slots.resize(schedule.order == Order::kShuffled ? kBlocksAtOnce : 1);
  for (size_t i = 0; i < slots.size(); ++i) {
    slots[i].first_fiber = i * block_threads;
    slots[i].first_warp = i * block_warps;
  }
  MakeFibers(slots.size() * block_threads);
  warps.resize(slots.size() * block_warps);
  running_kernel = &kernel;
  random_bits.seed(schedule.seed);
  blockDim = block;
  gridDim = grid;
  const std::vector<size_t> order = Arranged(blocks);
  for (auto next = order.begin();;) {
    bool any = false;
    for (Slot& slot : slots) {
      while (!slot.is_running && next != order.end()) {
        const auto at = static_cast<unsigned>(*next++);
        if (static_cast<int>(at) == mutation.drop_block) continue;
        Begin(slot, dim3(at % grid.x, at / grid.x % grid.y, at / (grid.x * grid.y)));
      }
      any = any || slot.is_running;
    }
    if (!any) break;
    Step();
  }
  slots.clear();
}

}  // namespace healthgpt::cuda::host
