#include "target.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace healthgpt {

bool IsSupported(Target target) {
#ifdef EMULATED_TARGET  // in tests
  if (target == Target::EMULATED_TARGET) return IsSupported(Target::kAvx2);
#endif
  switch (target) {
    case Target::kPortable:
      return true;
#if defined(__aarch64__)
    case Target::kNeon:
      return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
#if defined(__x86_64__)
    // The builtin asks the operating system, too, whether it keeps the registers.
    case Target::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Target::kAvxVnni: {
      unsigned a = 0, b = 0, c = 0, d = 0;
      return IsSupported(Target::kAvx2) && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
    }
    case Target::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && IsSupported(Target::kAvx2);
#endif
    default:
      return false;
  }
}

bool AllowAmx() {
#ifdef EMULATED_TARGET
  if (Target::EMULATED_TARGET == Target::kAvx512) return true;
#endif
#if defined(__x86_64__) && defined(SYS_arch_prctl)
  static const bool allowed = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
    constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA; Linux 5.16
    return IsSupported(Target::kAvx512) && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 &&
           (d & (kTile | kInt8)) == (kTile | kInt8) && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
  }();
  return allowed;
#else
  return false;
#endif
}

Target BestTarget() {
  static const Target best = [] {
    const Target from_the_fastest[] = {Target::kAvx512, Target::kAvxVnni, Target::kAvx2, Target::kNeon};
    for (Target target : from_the_fastest) {
      if (IsSupported(target)) return target;
    }
    return Target::kPortable;
  }();
  return best;
}

}  // namespace healthgpt
