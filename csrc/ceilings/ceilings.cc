#include "ceilings/ceilings.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "ceilings/target_kernels.h"

namespace healthgpt {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kWindows = 5;
constexpr double kWindowSeconds = 0.05;

// Threads that are joined in any case, also if starting another one throws.
struct Team {
  std::vector<std::thread> threads;
  ~Team() {
    for (auto& thread : threads) thread.join();
  }
  template <class Work>
  void Start(int count, Work work) {
    for (int thread = 0; thread < count; ++thread) threads.emplace_back([work, thread] { work(thread); });
  }
};

// The sum of all threads' work per second, in the best window. unit(thread) does some work and returns the amount; each
// thread calls it again and again for one window.
template <class Unit>
double BestRate(int threads, Unit unit) {
  double best = 0;
  for (int window = 0; window < kWindows; ++window) {
    std::vector<double> rates(static_cast<size_t>(threads));
    const auto measure = [&](int thread) {
      const auto begin = Clock::now();
      double work = 0, seconds = 0;
      do {
        work += unit(thread);
        seconds = std::chrono::duration<double>(Clock::now() - begin).count();
      } while (seconds < kWindowSeconds);
      rates[static_cast<size_t>(thread)] = work / seconds;
    };
    Team().Start(threads, measure);
    double sum = 0;
    for (const double rate : rates) sum += rate;
    best = std::max(best, sum);
  }
  return best;
}

CeilingLoops BestLoops() {
  static constexpr auto kLoops = TARGET_KERNELS(Ceilings);
  return kLoops[BestTarget()]();
}

}  // namespace

double ReadBandwidth(int threads, int64_t bytes) {
  const size_t share = static_cast<size_t>(bytes) / sizeof(uint64_t) / static_cast<size_t>(threads);
  // Not std::vector, which would touch the pages: each must be touched first by the thread that reads it.
  const std::unique_ptr<uint64_t[]> buffer(new uint64_t[share * static_cast<size_t>(threads)]);
  const auto part = [&](int thread) { return buffer.get() + share * static_cast<size_t>(thread); };
  Team().Start(threads, [&](int thread) { std::memset(part(thread), 1, share * sizeof(uint64_t)); });
  double best = 0;
  for (const CeilingLoops::Loop read : BestLoops().read) {
    best = std::max(best, BestRate(threads, [&](int thread) { return read(part(thread), share * sizeof(uint64_t)); }));
  }
  return best;
}

double Int8Rate(int threads) {
  return BestRate(threads, [loop = BestLoops().int8](int) { return loop(nullptr, 0); });
}

double Float32Rate(int threads) {
  return BestRate(threads, [loop = BestLoops().float32](int) { return loop(nullptr, 0); });
}

}  // namespace healthgpt
