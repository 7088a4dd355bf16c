// How a launcher spreads its work over threads without knowing whose threads they are: ONNX Runtime's own pool inside
// a session, a pool of the caller's in Python. One pool per process is in use at a time, so none is oversubscribed.
#pragma once

#include <cstddef>

namespace healthgpt {

class Parallel {
 public:
  using Task = void (*)(void* state, size_t index);
  // Calls task(state, index) once for every index below count, in any order, and returns when all are done.
  using Run = void (*)(void* pool, size_t count, Task task, void* state);

  Parallel(void* pool, Run run) : pool_(pool), run_(run) {}
  // All on the calling thread.
  Parallel() : Parallel(nullptr, nullptr) {}

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
};

}  // namespace healthgpt
