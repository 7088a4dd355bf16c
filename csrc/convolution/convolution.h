// y = conv(swish(norm(x))) + b + residual: the 3x3 convolutions of the VQGAN (taming-transformers; Esser et al., 2021,
// arXiv 2012.09841), together with the operations around them.
//
// It takes raw pointers, so that every integration calls the same launcher. Pictures are channels-last. The operands
// are laid out as the exporter writes them, so the kernel reads the mapped file.
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
  int64_t groups = 0;                  // of the normalisation, a divisor of C; 0 for no normalisation and no swish
  int64_t enlarge = 1;                 // 2 repeats every pixel 2x2 (nearest neighbour) before the convolution
  const float* x = nullptr;            // (B, H, W, C)
  const float* norm_weight = nullptr;  // (C), null if groups is 0, like norm_bias
  const float* norm_bias = nullptr;    // (C)
  const void* weight = nullptr;        // (3, 3, C, O), for cross-correlation; row and column of the kernel come first
  bool half = false;                   // the weight is float16, otherwise float32
  const float* bias = nullptr;         // (O)
  const float* residual = nullptr;     // in the shape of y, or null
  float* y = nullptr;                  // (B, enlarge H, enlarge W, O)
};

constexpr float kGroupNormEpsilon = 1e-6f;

// The picture is padded with zeros. All arithmetic is float32, by Winograd's F(4x4, 3x3) (Lavin and Gray, 2015, arXiv
// 1509.09308), which needs a quarter of the multiplications. The result does not depend on the threads.
void Convolution(const ConvolutionArguments& arguments, const Parallel& parallel, Target target = BestTarget());

}  // namespace healthgpt
