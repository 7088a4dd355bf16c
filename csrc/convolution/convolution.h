// y = conv(swish(norm(x))) + b + residual: the 3x3 convolutions of the VQGAN (taming-transformers; Esser et al., 2021,
// arXiv 2012.09841), with what stands around them.
//
// Raw pointers only: every integration calls this same launcher. Pictures are channels-last. The operands are laid out
// as the exporter writes them, so the kernel reads the mapped file.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "target.h"

namespace healthgpt {

struct ConvolutionArguments {
  int64_t batch = 0;
  int64_t height = 0, width = 0;       // of x
  int64_t channels = 0;                // C
  int64_t outputs = 0;                 // O
  int64_t groups = 0;                  // of the normalisation, dividing C; 0 for none, and then no swish either
  int64_t enlarge = 1;                 // 2: every pixel of x stands for 2x2 (nearest neighbour) before the convolution
  const float* x = nullptr;            // (B, H, W, C)
  const float* norm_weight = nullptr;  // (C), as all of the next where groups is not 0
  const float* norm_bias = nullptr;    // (C)
  const void* weight = nullptr;        // (3, 3, C, O), cross-correlation: row and column of the kernel first
  bool half = false;                   // the weight is float16, else float32
  const float* bias = nullptr;         // (O)
  const float* residual = nullptr;     // like y, or null
  float* y = nullptr;                  // (B, enlarge H, enlarge W, O)
};

constexpr float kGroupNormEpsilon = 1e-6f;

// Zeros stand around the picture. All arithmetic is float32; the products are those of Winograd's F(4x4, 3x3) (Lavin
// and Gray, 2015, arXiv 1509.09308), a quarter of the direct ones. The result does not depend on the threads.
void Convolution(const ConvolutionArguments& arguments, const Parallel& parallel, Target target = BestTarget());

}  // namespace healthgpt
