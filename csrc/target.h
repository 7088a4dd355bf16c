// The instruction sets that the kernels are written for, and which of them this machine has.
#pragma once

namespace healthgpt {

// kPortable runs everywhere; the others are ordered from the slower to the faster.
enum class Target { kPortable, kNeon, kAvx2, kAvxVnni, kAvx512 };

// Whether this build, processor and operating system have it.
bool IsSupported(Target target);

// The fastest supported one.
Target BestTarget();

// A function compiled once per target, or null where this build has none for it.
template <class Function>
struct PerTarget {
  Function portable, neon, avx2, avx_vnni, avx512;
  Function operator[](Target target) const {
    switch (target) {
      case Target::kNeon:
        return neon;
      case Target::kAvx2:
        return avx2;
      case Target::kAvxVnni:
        return avx_vnni;
      case Target::kAvx512:
        return avx512;
      default:
        return portable;
    }
  }
};

// The PerTarget of the kernels NamePortable, NameAvx512 and so on that this machine's processors may run.
#if defined(__x86_64__)
#define TARGET_KERNELS(Name) \
  PerTarget<Name##Kernel*> { Name##Portable, nullptr, Name##Avx2, Name##AvxVnni, Name##Avx512 }
#elif defined(__aarch64__)
#define TARGET_KERNELS(Name) \
  PerTarget<Name##Kernel*> { Name##Portable, Name##Neon, nullptr, nullptr, nullptr }
#else
#define TARGET_KERNELS(Name) \
  PerTarget<Name##Kernel*> { Name##Portable, nullptr, nullptr, nullptr, nullptr }
#endif

}  // namespace healthgpt
