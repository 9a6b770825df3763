#include "cpu.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace dfk {
namespace {

struct Choice {
  Isa isa;
  std::string reason;
};

#if defined(DFK_X86)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

// VNNI and BF16 come together with AVX-512 on every CPU since 2020 (Cooper Lake, Sapphire Rapids, Zen 4); the ones
// before (Skylake-X, Ice Lake without BF16) take the AVX2 kernels.
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}
#endif

Choice best() {
#if defined(DFK_X86)
  __builtin_cpu_init();  // also asks whether the operating system saves the wide registers
  if (has_avx512()) return {Isa::avx512, "the CPU has AVX-512 with VNNI and BF16"};
  if (has_avx2()) return {Isa::avx2, "the CPU has AVX2, FMA and F16C but not AVX-512 with VNNI and BF16"};
  return {Isa::scalar, "the CPU has no AVX2"};
#else
  return {Isa::scalar, "no vector kernels are written for this architecture"};
#endif
}

Choice choose() {
  Choice found = best();
  const char* asked = std::getenv("DFASTLLM_ISA");
  if (asked == nullptr || *asked == 0) return found;
  const std::string name = asked;
  Isa isa;
  if (name == "avx512") isa = Isa::avx512;
  else if (name == "avx2") isa = Isa::avx2;
  else if (name == "scalar") isa = Isa::scalar;
  else throw std::runtime_error("DFASTLLM_ISA must be scalar, avx2 or avx512, got '" + name + "'");
  if (isa > found.isa) {
    throw std::runtime_error("DFASTLLM_ISA asks for " + name + ", which cannot run here: " + found.reason);
  }
  return {isa, "DFASTLLM_ISA asks for it"};
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace

Isa isa() { return chosen().isa; }

const char* isa_name() {
  switch (isa()) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "scalar";
  }
}

const char* isa_reason() { return chosen().reason.c_str(); }

}  // namespace dfk
