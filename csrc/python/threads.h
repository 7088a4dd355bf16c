// Threads for a call from Python, started with the call and joined at its end. Sessions use ONNX Runtime's pool
// instead.
#pragma once

#include <atomic>
#include <cstddef>
#include <exception>
#include <thread>
#include <vector>

#include "parallel.h"

namespace healthgpt {

class Threads {
 public:
  explicit Threads(size_t count) : count_(count) {}

  Parallel parallel() { return count_ > 1 ? Parallel(this, &Threads::Run, count_) : Parallel(); }

 private:
  static void Run(void* pool, size_t count, Parallel::Task task, void* state) {
    std::atomic<size_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error;  // the first of a task, thrown again on the caller's thread
    const auto work = [&] {
      try {
        for (size_t index = next++; index < count; index = next++) task(state, index);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    };
    std::vector<std::thread> others;
    try {
      for (size_t i = 1; i < static_cast<Threads*>(pool)->count_ && i < count; ++i) others.emplace_back(work);
    } catch (const std::exception&) {  // the system has no more threads: those already started do the work
    }
    work();
    for (std::thread& other : others) other.join();
    if (error) std::rethrow_exception(error);
  }

  size_t count_;
};

}  // namespace healthgpt
