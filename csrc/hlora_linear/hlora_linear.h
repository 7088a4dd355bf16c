// y = x W + b + gate(x R) * (x A) B: one H-LoRA linear (HealthGPT, arXiv 2502.09838, section 3.3).
//
// It takes raw pointers, so that every integration (pybind11, ONNX Runtime) calls the same launcher. The operands are
// laid out as the exporter writes them for the node healthgpt::HLoraLinear, so the kernels read the mapped file.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "target.h"

namespace healthgpt {

// The outputs of a panel, a multiple of any tile of the kernels: 64 bytes of int4.
constexpr int64_t kPanel = 128;

enum class Storage { kFloat32, kFloat16, kBFloat16, kInt8, kInt4 };

// A matrix (channels, outputs). int4 holds two neighbouring outputs per byte, the even one in the low bits. An integer
// stands for scales(channel / block_size, output) * value; there are no zero points. Values and scales are in row-major
// order, or integers are in panels (outputs / panel, channels, panel), as their scales are: few rows, which go through
// a panel from its first channel to its last, then read memory in order. Scales in panels are bfloat16.
struct Matrix {
  const void* values = nullptr;
  const void* scales = nullptr;  // (ceil(channels / block_size), outputs), null for floats
  Storage storage = Storage::kFloat32;
  int64_t channels = 0;  // at least 1, like outputs
  int64_t outputs = 0;
  int64_t block_size = 0;  // a multiple of 4, at most 256; 0 for floats
  int64_t panel = 0;       // kPanel, or 0 for row-major order
};

struct HLoraLinearArguments {
  int64_t rows = 0;             // S: tokens
  int64_t experts = 0;          // E; 0 for a plain linear, without adapters
  const float* x = nullptr;     // (S, C)
  Matrix weight;                // (C, O)
  const float* bias = nullptr;  // (O) or null
  Matrix adapter_in;            // (C, R + E): A, then the router; R is a multiple of E
  Matrix adapter_out;           // (R, O): B with the H-LoRA scaling folded in
  float* y = nullptr;           // (S, O)
  // Neighbouring operations of a layer, of which x takes one at most.
  bool normalise = false;  // replaces x by x / sqrt(mean(x^2) + epsilon)
  float epsilon = 0;
  bool pair_input = false;          // x is (S, 2 C) and stands for silu(x[:, :C]) * x[:, C:]
  bool quick_gelu = false;          // x stands for x / (1 + e^(-1.702 x))
  const float* residual = nullptr;  // (S, O) or null, added to the result; may be y
};

// With integer weights x is quantised to 8 bits per row and block, as in ONNX Runtime. Sums are exact within a block
// and float32 between blocks. With float weights everything is float32. A row's bits depend neither on the other rows
// of the call nor on the threads. Working memory is kept per thread and reused (scratch.h).
void HLoraLinear(const HLoraLinearArguments& arguments, const Parallel& parallel, Target target = BestTarget());

// Whether many rows are multiplied by AMX in this process: the processor has it, and a first product came out right.
bool UsesAmx();

}  // namespace healthgpt
