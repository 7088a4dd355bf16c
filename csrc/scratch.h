// Working memory that is kept between calls: once the buffers have grown, a decode step allocates nothing.
#pragma once

#include <cstddef>

namespace healthgpt {

// kCall is for the launcher's thread during one call, kTask for a thread that runs one of the call's tasks.
enum class Scratch { kCall, kTask };

// At least `bytes` bytes of this thread's memory, aligned to 64 bytes. Another request for the same purpose gives the
// same memory. Throws std::bad_alloc; a pool hands what a task throws to the thread that made the call.
void* ScratchMemory(Scratch purpose, size_t bytes);

}  // namespace healthgpt
