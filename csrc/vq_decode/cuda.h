// The operations between the convolutions of the VQGAN's decoder, channels-last. A library does the convolutions. B
// batch, P positions, C channels, h and w rows and columns of the smaller image.
#pragma once

#include "cuda/storage.h"

namespace healthgpt::cuda {

struct GroupNormArguments {
  int64_t batch = 0, positions = 0, channels = 0, groups = 0;
  Storage storage = Storage::kFloat16;  // of x and y: float32, float16 or bfloat16
  const void* x = nullptr;              // (B, P, C)
  const float* weight = nullptr;        // (C)
  const float* bias = nullptr;          // (C)
  float epsilon = 0;
  bool swish = false;           // multiply the result by its own sigmoid
  void* y = nullptr;            // (B, P, C), may be x
  void* workspace = nullptr;    // of GroupNormWorkspaceBytes, set to zero before its first use
  int64_t workspace_bytes = 0;  // calls that follow each other in a stream can share one workspace
};

int64_t GroupNormWorkspaceBytes(const GroupNormArguments& arguments);

// Two launches. Mean and variance are float32 sums of differences from one of the group's own numbers.
Status GroupNorm(const GroupNormArguments& arguments, Stream stream);

struct PhaseInterleaveArguments {
  int64_t batch = 0, height = 0, width = 0, channels = 0;  // h and w, before doubling
  Storage storage = Storage::kFloat16;
  const void* phases = nullptr;  // (B, h + 1, w + 1, 2, 2, C)
  void* image = nullptr;         // (B, 2 h, 2 w, C)
};

// image[2 i - 1 + y, 2 j - 1 + x] = phases[i, j, y, x], without the positions outside the image. This ends an
// upsampling convolution that was computed on the small image (export/fold.py, upsample_kernel, with its outputs
// ordered (y, x, o)).
Status PhaseInterleave(const PhaseInterleaveArguments& arguments, Stream stream);

struct ImageLevelsArguments {
  int64_t count = 0;
  Storage storage = Storage::kFloat16;
  const void* x = nullptr;   // (count)
  uint8_t* image = nullptr;  // (count)
};

// (clamp(x, -1, 1) + 1) / 2 * 255, truncated like the original. NaN becomes 0.
Status ImageLevels(const ImageLevelsArguments& arguments, Stream stream);

}  // namespace healthgpt::cuda
