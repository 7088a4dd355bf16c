// Working memory that is kept: a decode step allocates nothing once its buffers have grown.
#pragma once

#include <cstddef>

namespace healthgpt {

// kCall belongs to the launcher's own thread for one call, kTask to whichever thread runs a task of it.
enum class Scratch { kCall, kTask };

// At least `bytes` of this thread's memory, aligned to 64 bytes. Asking again for the same purpose gives the same
// memory. If the system has none left, std::bad_alloc of kCall; of kTask the end of the program, for a pool's thread
// has nobody to tell: a task takes a few MB at most, so it is a call's that runs out.
void* ScratchMemory(Scratch purpose, size_t bytes);

}  // namespace healthgpt
