// How a launcher distributes its work over threads that belong to its caller: ONNX Runtime's pool inside a session, a
// pool of the binding in Python. Only one pool is in use at a time, so the processor is not oversubscribed.
#pragma once

#include <cstddef>

namespace healthgpt {

class Parallel {
 public:
  using Task = void (*)(void* state, size_t index);
  // Calls task(state, index) once for every index below count, in any order, and returns when all are done.
  using Run = void (*)(void* pool, size_t count, Task task, void* state);

  Parallel(void* pool, Run run, size_t threads) : pool_(pool), run_(run), threads_(threads) {}
  // Runs everything on the calling thread.
  Parallel() : Parallel(nullptr, nullptr, 1) {}

  // For so many it pays to have work. No result depends on it.
  size_t threads() const { return threads_; }

  template <class Function>
  void operator()(size_t count, Function function) const {
    if (run_ == nullptr || count <= 1) {
      for (size_t index = 0; index < count; ++index) function(index);
      return;
    }
    run_(pool_, count, [](void* state, size_t index) { (*static_cast<Function*>(state))(index); }, &function);
  }

 private:
  void* pool_;
  Run run_;
  size_t threads_;
};

}  // namespace healthgpt
