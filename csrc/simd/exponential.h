// e^x on vectors, and swish.
#pragma once

#include "simd/simd.h"

namespace healthgpt {
namespace {

// e^x for x up to 88, to 2 units in the last place. Below -87 the result is e^-87.
SIMD_INLINE Simd::Floats Exp(Simd::Floats x) {
  x = Simd::Max(Simd::Repeat(-87.0f), x);  // in this order of arguments NaN stays NaN
  const Simd::Floats whole = Simd::Round(Simd::Multiply(x, Simd::Repeat(1.44269504f)));
  Simd::Floats rest = Simd::MultiplyAdd(whole, Simd::Repeat(-0.693359375f), x);
  rest = Simd::MultiplyAdd(whole, Simd::Repeat(2.12194440e-4f), rest);
  Simd::Floats power = Simd::Repeat(1.0f / 720);
  constexpr float coefficients[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (const float coefficient : coefficients) {
    power = Simd::MultiplyAdd(power, rest, Simd::Repeat(coefficient));
  }
  return Simd::Multiply(power, Simd::PowerOfTwo(whole));
}

// x sigmoid(slope x): with a slope of 1 also called silu.
SIMD_INLINE Simd::Floats Swish(Simd::Floats x, float slope = 1.0f) {
  // The limit keeps the power finite. Below it, the result would be 0 to about 1e-36 anyway.
  const Simd::Floats limited = Simd::Max(Simd::Repeat(-87.0f / slope), x);
  return Simd::Divide(x, Simd::Add(Simd::Repeat(1.0f), Exp(Simd::Multiply(Simd::Repeat(-slope), limited))));
}

}  // namespace
}  // namespace healthgpt
