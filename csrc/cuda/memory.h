// GPU memory for the callers of launchers, which allocate nothing themselves. In the host build it is ordinary memory.
#pragma once

#include <memory>

#include "cuda/storage.h"

namespace healthgpt::cuda {

// `bytes` bytes, set to zero before any stream can see them. Throws std::runtime_error if there is not enough memory.
class Memory {
 public:
  explicit Memory(int64_t bytes);

  void* data() const { return data_.get(); }
  int64_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(void* data) const;
  };
  std::unique_ptr<void, Free> data_;
  int64_t bytes_;
};

// Copies `rows` rows of `bytes` bytes to the GPU, from the host or the GPU, and waits for the end of the copy.
Status CopyRows(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t bytes, int64_t rows);

Status Copy(void* to, const void* from, int64_t bytes, Stream stream);

}  // namespace healthgpt::cuda
