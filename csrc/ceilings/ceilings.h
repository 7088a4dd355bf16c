// The machine's measured limits, which benchmarks compare with.
//
// Each is a loop that does nothing else. The best of several short windows counts, so that other work on the machine
// lowers a result as little as possible. Each call starts threads of its own and ends them.
#pragma once

#include <cstdint>

namespace healthgpt {

// Bytes per second that `threads` threads together read from a buffer of `bytes` bytes, each its own part in order, by
// the better of a loop that only reads and one that prefetches, too. The buffer must be much larger than the last-level
// cache; otherwise the cache is measured. Its pages are small, like those of the mapped weight files.
double ReadBandwidth(int threads, int64_t bytes);

// Operations per second (a multiplication and an addition are two) of the kernels' products of bytes with unpacked
// 4-bit weights, summed in int32. All operands are in registers; the instructions are those that the kernels use.
double Int8Rate(int threads);

// The same for float32 multiply-adds.
double Float32Rate(int threads);

}  // namespace healthgpt
