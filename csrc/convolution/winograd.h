// The three transforms of Winograd's F(4x4, 3x3), which computes 4x4 outputs of a 3x3 kernel from 6x6 inputs with 36
// products (Lavin and Gray, 2015, arXiv 1509.09308, equation 8; points 0, 1, -1, 2, -2, inf):
//   Y = A' [(G g G') * (B' d B)] A
// Each transform is applied to vectors, first along the columns, then along the rows.
#pragma once

#include "simd/simd.h"

namespace healthgpt {
namespace {

constexpr int kOutputSide = 4;
constexpr int kKernelSide = 3;
constexpr int kInputSide = kOutputSide + kKernelSide - 1;
constexpr int kProducts = kInputSide * kInputSide;

using Floats = Simd::Floats;

SIMD_INLINE Floats Scaled(float factor, Floats a) { return Simd::Multiply(Simd::Repeat(factor), a); }
// factor a + b
SIMD_INLINE Floats AddScaled(float factor, Floats a, Floats b) { return Simd::MultiplyAdd(Simd::Repeat(factor), a, b); }

// B' d
SIMD_INLINE void TransformInput(const Floats (&d)[6], Floats (&to)[6]) {
  to[0] = AddScaled(-5.0f, d[2], AddScaled(4.0f, d[0], d[4]));
  const Floats even = AddScaled(-4.0f, d[2], d[4]), odd = AddScaled(-4.0f, d[1], d[3]);
  to[1] = Simd::Add(even, odd);
  to[2] = AddScaled(-1.0f, odd, even);
  const Floats near = AddScaled(-1.0f, d[2], d[4]), far = AddScaled(-1.0f, d[1], d[3]);
  to[3] = AddScaled(2.0f, far, near);
  to[4] = AddScaled(-2.0f, far, near);
  to[5] = AddScaled(-5.0f, d[3], AddScaled(4.0f, d[1], d[5]));
}

// G g
SIMD_INLINE void TransformKernel(const Floats (&g)[3], Floats (&to)[6]) {
  to[0] = Scaled(1.0f / 4, g[0]);
  const Floats sixth = Scaled(-1.0f / 6, Simd::Add(g[0], g[2]));
  to[1] = AddScaled(-1.0f / 6, g[1], sixth);
  to[2] = AddScaled(1.0f / 6, g[1], sixth);
  const Floats ends = AddScaled(1.0f / 6, g[2], Scaled(1.0f / 24, g[0]));
  to[3] = AddScaled(1.0f / 12, g[1], ends);
  to[4] = AddScaled(-1.0f / 12, g[1], ends);
  to[5] = g[2];
}

// A' m
SIMD_INLINE void TransformOutput(const Floats (&m)[6], Floats (&to)[4]) {
  const Floats sum1 = Simd::Add(m[1], m[2]), sum2 = Simd::Add(m[3], m[4]);
  const Floats difference1 = AddScaled(-1.0f, m[2], m[1]), difference2 = AddScaled(-1.0f, m[4], m[3]);
  to[0] = Simd::Add(m[0], Simd::Add(sum1, sum2));
  to[1] = AddScaled(2.0f, difference2, difference1);
  to[2] = AddScaled(4.0f, sum2, sum1);
  to[3] = Simd::Add(AddScaled(8.0f, difference2, difference1), m[5]);
}

// Applies a transform from both sides to the from x from vectors of load(Constant<row>, Constant<column>), and calls
// store(Constant<row>, Constant<column>, vector) for each of the to x to results.
template <int from, int to, class Transform, class Load, class Store>
SIMD_INLINE void TransformBothSides(const Transform& transform, const Load& load, const Store& store) {
  Floats half[from][to];  // by column of the input
  Unroll<from>([&](auto column) SIMD_INLINE_LAMBDA {
    Floats lane[from];
    Unroll<from>([&](auto row) SIMD_INLINE_LAMBDA { lane[row] = load(row, column); });
    transform(lane, half[column]);
  });
  Unroll<to>([&](auto row) SIMD_INLINE_LAMBDA {
    Floats lane[from], done[to];
    Unroll<from>([&](auto column) SIMD_INLINE_LAMBDA { lane[column] = half[column][row]; });
    transform(lane, done);
    Unroll<to>([&](auto column) SIMD_INLINE_LAMBDA { store(row, column, done[column]); });
  });
}

}  // namespace
}  // namespace healthgpt
