// Weights on the GPU that several sessions hold: the tasks of a bundle share their base.
#pragma once

#include <memory>

#include "cuda/memory.h"

namespace healthgpt::cuda {

// GPU memory with `rows` rows of `row_bytes` bytes of the host, `stride` bytes apart. As long as anyone holds it, equal
// rows get the same memory. Waits for the copy. Throws like Memory.
std::shared_ptr<const Memory> SharedRows(const void* host, int64_t rows, int64_t row_bytes, int64_t stride);

// The bytes of all that is held.
int64_t SharedRowsBytes();

}  // namespace healthgpt::cuda
