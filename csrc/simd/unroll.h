// Loops over vectors that must stay in registers. GCC unrolls ordinary loops only after it has decided which arrays are
// in memory. Here every index is a constant from the start.
#pragma once

#define SIMD_INLINE inline __attribute__((always_inline))
#define SIMD_INLINE_LAMBDA __attribute__((always_inline))
// For a loop that GCC compiles worse as part of its caller.
#define SIMD_OUTLINE __attribute__((noinline))

// SIMD_KEEP keeps a sum in one register over the iterations of a loop; GCC 12 would otherwise copy all sums through
// memory in every iteration. SIMD_HOLD does the same and also keeps a result that is never read. Vectors that no
// register holds (SIMD_IN_MEMORY) have nothing to keep.
#if defined(SIMD_IN_MEMORY)
#define SIMD_KEEP(vector) static_cast<void>(vector)
#define SIMD_HOLD(vector) asm volatile("" : "+m"(vector))
#elif defined(__x86_64__)
#define SIMD_KEEP(vector) asm("" : "+v"(vector))
#define SIMD_HOLD(vector) asm volatile("" : "+v"(vector))
#elif defined(__aarch64__)
#define SIMD_KEEP(vector) asm("" : "+w"(vector))
#define SIMD_HOLD(vector) asm volatile("" : "+w"(vector))
#endif
// Makes the compiler forget what it knows of this pointer's target, so that it loads again instead of keeping
// registers.
#define SIMD_ANEW(pointer) asm("" : "+r"(pointer))

namespace healthgpt {
namespace {

template <int number>
struct Constant {
  static constexpr int value = number;
  constexpr operator int() const { return number; }
};

// function(Constant<0>{}), ..., function(Constant<count - 1>{})
template <int count, class Function>
SIMD_INLINE void Unroll(const Function& function) {
  if constexpr (count > 0) {
    Unroll<count - 1>(function);
    function(Constant<count - 1>{});
  }
}

// Picks the function for `number` rows from those for 1, 2, 3, ... rows.
template <class Function, class... More>
SIMD_INLINE Function* Pick(long number, Function* first, More*... more) {
  if constexpr (sizeof...(more) > 0) {
    if (number > 1) return Pick(number - 1, more...);
  }
  return first;
}

}  // namespace
}  // namespace healthgpt
