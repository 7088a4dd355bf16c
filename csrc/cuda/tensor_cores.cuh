// The only tensor-core product in use: a warp multiplies 16 x 16 by 16 x 8 and adds to 16 x 8 float32 sums.
//
// Lane 4 g + t holds (PTX ISA, mma.m16n8k16):
//   left operand   rows g and g + 8 at columns 2t, 2t+1, 2t+8, 2t+9
//   right operand  column g at rows 2t, 2t+1, 2t+8, 2t+9
//   sums           rows g and g + 8 at columns 2t and 2t+1
#pragma once

#include "cuda/numbers.cuh"
#include "cuda/platform.cuh"

namespace healthgpt::cuda {

struct Left {
  uint32_t top_low, bottom_low, top_high, bottom_high;  // rows g, g + 8, g, g + 8; columns low, low, high, high
};
struct Right {
  uint32_t low, high;
};
struct Sums {
  float values[4];  // (g, 2t), (g, 2t+1), (g + 8, 2t), (g + 8, 2t+1)
};

#ifdef __CUDACC__

__device__ inline void MultiplyAdd(Sums& sums, const Left& left, const Right& right, Half) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums.values[0]), "+f"(sums.values[1]), "+f"(sums.values[2]), "+f"(sums.values[3])
      : "r"(left.top_low), "r"(left.bottom_low), "r"(left.top_high), "r"(left.bottom_high), "r"(right.low),
        "r"(right.high));
#else  // Turing multiplies half of the columns at a time.
  const uint32_t parts[2][3] = {{left.top_low, left.bottom_low, right.low},
                                {left.top_high, left.bottom_high, right.high}};
  for (const auto& part : parts) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(sums.values[0]), "+f"(sums.values[1]), "+f"(sums.values[2]), "+f"(sums.values[3])
        : "r"(part[0]), "r"(part[1]), "r"(part[2]));
  }
#endif
}

// Turing's tensor cores have no bfloat16. The launchers refuse it there.
__device__ inline void MultiplyAdd(Sums& sums, const Left& left, const Right& right, BFloat16) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums.values[0]), "+f"(sums.values[1]), "+f"(sums.values[2]), "+f"(sums.values[3])
      : "r"(left.top_low), "r"(left.bottom_low), "r"(left.top_high), "r"(left.bottom_high), "r"(right.low),
        "r"(right.high));
#endif
}

#else

template <class Type>
void MultiplyAdd(Sums& sums, const Left& left, const Right& right, Type) {
  struct Brought {
    Left left;
    Right right;
  };
  const auto brought = host::Exchange(Brought{left, right});
  const int lane = static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarpSize);
  const int g = lane / 4, t = lane % 4;
  const auto number = [](uint32_t pair, int i) { return ToFloat(Type{static_cast<uint16_t>(pair >> (16 * i))}); };
  for (int quad = 0; quad < 4; ++quad) {
    const Left rows = brought[4 * g + quad].left;
    for (int column = 0; column < 2; ++column) {
      const Right factors = brought[4 * (2 * t + column) + quad].right;
      for (int i = 0; i < 2; ++i) {
        const float low = number(factors.low, i), high = number(factors.high, i);
        sums.values[column] += number(rows.top_low, i) * low + number(rows.top_high, i) * high;
        sums.values[2 + column] += number(rows.bottom_low, i) * low + number(rows.bottom_high, i) * high;
      }
    }
  }
}

#endif

}  // namespace healthgpt::cuda
