// Memory on the GPU, for whoever calls launchers: they allocate nothing themselves. On the host's fibers, its own
// memory.
#pragma once

#include "cuda/storage.h"

namespace healthgpt::cuda {

// So many bytes, zeros before any stream can see them; throws std::runtime_error where there is no more memory.
class Memory {
 public:
  explicit Memory(int64_t bytes);
  ~Memory();
  Memory(Memory&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  Memory& operator=(Memory&&) = delete;

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Copies `rows` of so many bytes to the GPU, from there or from the host, and waits until that is done.
Status CopyRows(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t bytes, int64_t rows);

Status Copy(void* to, const void* from, int64_t bytes, Stream stream);

}  // namespace healthgpt::cuda
