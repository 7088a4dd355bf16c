// What the machine can do at most, measured: the denominators of a benchmark's shares.
//
// Loops that do nothing else. Each takes the best of several short windows, so that other work on the machine
// lowers a ceiling as little as possible. Threads are the ceiling's own and end with the call.
#pragma once

#include <cstdint>

namespace healthgpt {

// Bytes per second that `threads` threads together read from a buffer of `bytes`, each its own part in order. The
// buffer has to be much larger than the last-level cache, or it is the cache that is measured. Its pages are small,
// like those of the mapped weight files.
double ReadBandwidth(int threads, int64_t bytes);

// Operations per second (a multiplication and an addition are two) of the kernels' products of bytes with 4-bit
// weights, unpacked, into int32: operands in registers, in the order of instructions that the target has for them.
double Int8Rate(int threads);

// The same of float32 multiply-adds.
double Float32Rate(int threads);

}  // namespace healthgpt
