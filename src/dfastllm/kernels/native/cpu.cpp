#include "cpu.h"

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#if defined(DFK_X86)
#include <cpuid.h>
#elif defined(DFK_ARM) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(DFK_ARM) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace dfk {
namespace {

#if defined(DFK_X86)
// F16C, which Clang's __builtin_cpu_supports does not know: CPUID leaf 1, bit 29 of ECX.
bool has_avx2() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 &&
         (ecx >> 29 & 1) != 0;
}

// AVX-VNNI: CPUID leaf 7, subleaf 1, bit 4 of EAX. Alder Lake and its successors have it without AVX-512.
bool has_avxvnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1) != 0;
}

// Cascade Lake, Ice Lake, Tiger Lake, Rocket Lake: VNNI on 512 bits, but no BF16.
bool has_avx512vl() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

// Cooper Lake, Sapphire Rapids, Zen 4 and what came after them.
bool has_avx512() { return has_avx512vl() && __builtin_cpu_supports("avx512bf16"); }
#elif defined(DFK_ARM)
#if defined(__APPLE__)
bool has_feature(const char* name) {
  int32_t value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool has_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has_dotprod() && has_feature("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__linux__)
// Bits of the kernel's interface (asm/hwcap.h), which older headers do not name.
bool has_dotprod() { return (getauxval(AT_HWCAP) >> 20 & 1) != 0; }                   // HWCAP_ASIMDDP
bool has_i8mm() { return has_dotprod() && (getauxval(AT_HWCAP2) >> 13 & 1) != 0; }    // HWCAP2_I8MM
#else
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
#endif
#endif

bool always() { return true; }

// The instruction sets of this build, lesser ones first. reason: why it is the best one here.
struct Level {
  Isa isa;
  const char* name;
  bool (*here)();
  const char* reason;
};

constexpr Level kLevels[] = {
#if defined(DFK_X86)
    {Isa::scalar, "scalar", always, "the CPU has no AVX2"},
    {Isa::avx2, "avx2", has_avx2, "the CPU has AVX2, FMA and F16C but no VNNI"},
#if defined(DFK_AVXVNNI)
    {Isa::avxvnni, "avxvnni", has_avxvnni, "the CPU has AVX-VNNI but not AVX-512 with VNNI"},
#endif
    {Isa::avx512vl, "avx512vl", has_avx512vl, "the CPU has AVX-512 with VNNI but no BF16: VNNI on 256 bits"},
    {Isa::avx512, "avx512", has_avx512, "the CPU has AVX-512 with VNNI and BF16"},
#elif defined(DFK_ARM)
    {Isa::scalar, "scalar", always, "no vector kernels are asked for"},
    {Isa::neon, "neon", always, "the CPU has NEON but not its dot products (DotProd)"},
    {Isa::dotprod, "dotprod", has_dotprod, "the CPU has NEON with DotProd but not I8MM"},
    {Isa::i8mm, "i8mm", has_i8mm, "the CPU has NEON with DotProd and I8MM"},
#else
    {Isa::scalar, "scalar", always, "no vector kernels are written for this architecture"},
#endif
};

struct Choice {
  const Level* level;
  std::string reason;
};

// "scalar, avx2 or avx512"
std::string names() {
  std::string out;
  for (size_t i = 0; i < std::size(kLevels); ++i) {
    out += i == 0 ? "" : i + 1 == std::size(kLevels) ? " or " : ", ";
    out += kLevels[i].name;
  }
  return out;
}

Choice choose() {
#if defined(DFK_X86)
  __builtin_cpu_init();  // also asks whether the operating system saves the wide registers
#endif
  const Level* best = kLevels;
  for (const Level& level : kLevels) {
    if (level.here()) best = &level;
  }
  const char* asked = std::getenv("DFASTLLM_ISA");
  if (asked == nullptr || *asked == 0) return {best, best->reason};
  const std::string name = asked;
  for (const Level& level : kLevels) {
    if (name != level.name) continue;
    if (!level.here()) throw std::runtime_error("DFASTLLM_ISA asks for " + name + ", which cannot run here: " + best->reason);
    return {&level, "DFASTLLM_ISA asks for it"};
  }
  throw std::runtime_error("DFASTLLM_ISA must be " + names() + ", got '" + name + "'");
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace

Isa isa() { return chosen().level->isa; }

const char* isa_name() { return chosen().level->name; }

const char* isa_reason() { return chosen().reason.c_str(); }

}  // namespace dfk
