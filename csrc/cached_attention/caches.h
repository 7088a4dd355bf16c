// Keys and values as the caches store them: float32, float16, or int8 with a scale per row.
#pragma once

#include "cached_attention/cached_attention.h"
#include "simd/simd.h"
#include "simd/sizes.h"

namespace healthgpt {
namespace {

using Floats = Simd::Floats;

constexpr int64_t kLanes = Simd::kLanes;

int64_t CacheBytes(Storage cache) { return cache == Storage::kInt8 ? 1 : cache == Storage::kFloat16 ? 2 : 4; }

// Quantises a row to [-127, 127] and returns its scale. If a value is not finite, neither is the scale.
float RoundRow(const float* from, int64_t size, int8_t* to) {
  Floats largest = Simd::Repeat(0.0f), poison = Simd::Repeat(0.0f);
  const auto load = [&](int64_t i) { return Simd::Load(from + i, static_cast<int>(Min(kLanes, size - i))); };
  for (int64_t i = 0; i < size; i += kLanes) {
    largest = Simd::Max(largest, Simd::Magnitude(load(i)));
    poison = Simd::MultiplyAdd(load(i), Simd::Repeat(0.0f), poison);
  }
  const float range = Simd::Largest(largest);
  const Floats steps = Simd::Repeat(127.0f / (range > 1e-30f ? range : 1e-30f));
  for (int64_t i = 0; i < size; i += kLanes) {
    int8_t rounded[kLanes];
    Simd::StoreRounded(rounded, Simd::Multiply(load(i), steps));
    __builtin_memcpy(to + i, rounded, static_cast<size_t>(Min(kLanes, size - i)));
  }
  return range / 127.0f + Simd::Sum(poison);
}

void StoreHalves(const float* from, int64_t size, uint16_t* to) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t count = Min(kLanes, size - i);
    uint16_t halves[kLanes];
    Simd::StoreHalf(halves, Simd::Load(from + i, static_cast<int>(count)));
    __builtin_memcpy(to + i, halves, static_cast<size_t>(count) * 2);
  }
}

// Stores a row of `size` numbers in a cache; for int8 also its scale.
void StoreCached(Storage cache, const float* from, int64_t size, void* to, float* scale) {
  if (cache == Storage::kInt8) {
    *scale = RoundRow(from, size, static_cast<int8_t*>(to));
  } else if (cache == Storage::kFloat16) {
    StoreHalves(from, size, static_cast<uint16_t*>(to));
  } else {
    __builtin_memcpy(to, from, static_cast<size_t>(size) * sizeof(float));
  }
}

// A vector of `count` numbers from `at` on, then zeros. Numbers of int8 are not multiplied by their row's scale.
template <Storage storage>
SIMD_INLINE Floats LoadVector(const void* from, int64_t at, int count = kLanes) {
  if constexpr (storage == Storage::kInt8) {
    const int8_t* bytes = static_cast<const int8_t*>(from) + at;
    if (count >= kLanes) return Simd::LoadInt8(bytes);
    int8_t first[kLanes] = {};
    __builtin_memcpy(first, bytes, static_cast<size_t>(count));
    return Simd::LoadInt8(first);
  } else if constexpr (storage == Storage::kFloat16) {
    return Simd::LoadHalf(static_cast<const uint16_t*>(from) + at, count);
  } else {
    return Simd::Load(static_cast<const float*>(from) + at, count);
  }
}

// Copies `count` cached rows of `size` numbers, converted to float32 and padded with zeros to `width`, without their
// scales.
template <Storage storage>
void LoadCached(const void* from, int64_t count, int64_t size, int64_t width, float* to) {
  if (size == width) {  // without padding the rows are like one long row
    size *= count;
    count = 1;
  }
  for (int64_t row = 0; row < count; ++row) {
    const int64_t at = row * size;
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) Simd::Store(to + row * width + i, LoadVector<storage>(from, at + i));
    if (i < size) Simd::Store(to + row * width + i, LoadVector<storage>(from, at + i, static_cast<int>(size - i)));
  }
}

// Multiplies `count` numbers by `count` scales.
void MultiplyByScales(float* numbers, const float* scales, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats scale = Simd::Load(scales + i, static_cast<int>(Min(kLanes, count - i)));
    Simd::Store(numbers + i, Simd::Multiply(Simd::Load(numbers + i), scale));
  }
}

}  // namespace
}  // namespace healthgpt
