// Threads for calls from Python. Sessions use ONNX Runtime's pool instead, whose threads wait in a loop between the
// parallel sections of a pass, as these do.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "parallel.h"

namespace healthgpt {

class Threads {
 public:
  // The caller's thread is one of `count`.
  explicit Threads(size_t count) {
    try {
      for (size_t i = 1; i < count; ++i) others_.emplace_back([this] { Wait(); });
    } catch (const std::exception&) {  // the system has no more threads: those already started do the work
    }
  }
  ~Threads() {
    stopped_ = true;
    Begin();
    for (std::thread& other : others_) other.join();
  }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  Parallel parallel() { return others_.empty() ? Parallel() : Parallel(this, &Threads::Run, others_.size() + 1); }

 private:
  // Turns of a loop before a thread sleeps: about a millisecond.
  static constexpr size_t kTurns = 20000;

  static void Run(void* pool, size_t count, Parallel::Task task, void* state) {
    Threads& self = *static_cast<Threads*>(pool);
    const std::lock_guard<std::mutex> one_at_a_time(self.in_use_);
    self.task_ = task;
    self.state_ = state;
    self.count_ = count;
    self.next_ = 0;
    self.failed_ = false;
    self.error_ = nullptr;
    self.working_ = self.others_.size();
    self.Begin();
    self.Work();
    for (size_t turn = 0; self.working_ != 0; ++turn) {
      if (turn > kTurns) std::this_thread::yield();
    }
    if (self.error_) std::rethrow_exception(self.error_);
  }

  void Begin() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ++sections_;
    }
    begun_.notify_all();
  }

  // Works whenever a section begins.
  void Wait() {
    for (size_t seen = 0;;) {
      for (size_t turn = 0; sections_ == seen && turn < kTurns; ++turn) Pause();
      if (sections_ == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        begun_.wait(lock, [&] { return sections_ != seen; });
      }
      ++seen;
      if (stopped_) return;
      Work();
      --working_;
    }
  }

  void Work() {
    try {
      for (size_t index = next_++; index < count_; index = next_++) task_(state_, index);
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
  }

  static void Pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  std::mutex in_use_, mutex_;
  std::condition_variable begun_;
  std::atomic<size_t> sections_{0}, next_{0}, working_{0};
  std::atomic<bool> stopped_{false}, failed_{false};
  Parallel::Task task_ = nullptr;
  void* state_ = nullptr;
  size_t count_ = 0;
  std::exception_ptr error_;  // the first of a task, thrown again on the caller's thread
  std::vector<std::thread> others_;
};

}  // namespace healthgpt
