// y = x W + b + gate(x R) * (x A) B: one H-LoRA linear (HealthGPT, arXiv 2502.09838, section 3.3).
//
// Raw pointers only: every integration (pybind11, ONNX Runtime, TensorRT) calls this same launcher. The operands are
// laid out as the exporter writes them for the node healthgpt::HLoraLinear, so a kernel reads the mapped file.
#pragma once

#include <cstdint>

namespace healthgpt {

struct HLoraLinearShape {
  int64_t rows;      // S: tokens
  int64_t channels;  // C: inputs
  int64_t outputs;   // O
  int64_t rank;      // R: a multiple of experts
  int64_t experts;   // E
};

// The scalar reference, float32 with float32 accumulation: what every faster path is compared with.
// A row's result does not depend on the other rows of the call.
//   x            (S, C)
//   weight       (C, O)
//   bias         (O) or null
//   adapter_in   (C, R + E)  A, then the router
//   adapter_out  (R, O)      B with the H-LoRA scaling folded in
//   workspace    (R + E)     caller's memory, so that nothing is allocated here
//   y            (S, O)
void HLoraLinear(const HLoraLinearShape& shape, const float* x, const float* weight, const float* bias,
                 const float* adapter_in, const float* adapter_out, float* workspace, float* y);

}  // namespace healthgpt
