// Working memory that is kept between calls: once the buffers have grown, a decode step allocates nothing.
#pragma once

#include <cstddef>

namespace healthgpt {

// kCall is for the launcher's thread during one call, kTask for a thread that runs one of the call's tasks.
enum class Scratch { kCall, kTask };

// At least `bytes` bytes of this thread's memory, aligned to 64 bytes. Another request for the same purpose gives the
// same memory. If there is not enough memory, kCall throws std::bad_alloc and kTask ends the program, because a pool's
// thread cannot report an error. A task needs a few MB at most, so in practice it is kCall that fails.
void* ScratchMemory(Scratch purpose, size_t bytes);

}  // namespace healthgpt
