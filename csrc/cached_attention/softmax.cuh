// What the softmaxes of both attentions share.
#pragma once

#include <cmath>

#include "cuda/platform.cuh"

namespace healthgpt::cuda {
namespace {

constexpr float kNone = -INFINITY;  // the score of a position that is not visible

// Subtracted from scores before the exponential. It is 0 if no position is visible, or all scores are NaN.
__device__ inline float Shift(float largest) { return largest == kNone ? 0.0f : largest; }

}  // namespace
}  // namespace healthgpt::cuda
