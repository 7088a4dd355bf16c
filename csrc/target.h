// The instruction sets that the kernels are written for, and the choice of one at run time.
#pragma once

namespace healthgpt {

// kPortable runs everywhere. The others are ordered from slower to faster.
enum class Target { kPortable, kNeon, kAvx2, kAvxVnni, kAvx512 };

// Whether this build, the processor and the operating system support it.
bool IsSupported(Target target);

// The fastest supported one.
Target BestTarget();

// Whether the processor multiplies tiles of bytes (AMX), and the operating system lets this process do so.
bool AllowAmx();

// A function compiled once per target; null for targets that this build does not have.
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

// The PerTarget of the kernels NamePortable, NameAvx512 and so on that exist for this processor architecture.
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
