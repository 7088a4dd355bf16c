// Weights on the GPU that several sessions hold: the tasks of a bundle share their base.
#pragma once

#include <memory>

#include "cuda/memory.h"

namespace healthgpt::cuda {

// Rows on the host, or pieces of rows: first the first piece of all rows, then the second piece of all rows, and so on.
struct HostRows {
  const void* data;
  int64_t count;
  int64_t bytes;  // of a row
  int64_t pieces = 1;
};

// GPU memory with these rows, `stride` bytes apart. As long as anyone holds it, equal rows get the same memory. Waits
// for the copy. Throws like Memory.
std::shared_ptr<const Memory> SharedRows(const HostRows& rows, int64_t stride);

// The bytes of all that is held.
int64_t SharedRowsBytes();

}  // namespace healthgpt::cuda
