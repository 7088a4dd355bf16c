#include "scratch.h"

#include <cstdlib>
#include <new>

namespace healthgpt {
namespace {

struct Buffer {
  void* memory = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(memory); }
};

}  // namespace

void* ScratchMemory(Scratch purpose, size_t bytes) {
  thread_local Buffer buffers[2];
  Buffer& buffer = buffers[purpose == Scratch::kTask];
  if (buffer.bytes < bytes) {
    std::free(buffer.memory);
    buffer.bytes = (bytes + 4095) / 4096 * 4096;
    buffer.memory = std::aligned_alloc(64, buffer.bytes);
    if (buffer.memory == nullptr) {
      buffer.bytes = 0;
      throw std::bad_alloc();
    }
  }
  return buffer.memory;
}

}  // namespace healthgpt
