// Which instruction set the kernels use. Chosen once, at the first call.
#pragma once

namespace dfk {

enum class Isa {
  scalar,
  avx2, avxvnni, avx512vl, avx512,  // x86-64; avx512vl: the instructions of avxvnni, encoded as AVX-512's on 256 bits
  neon, dotprod, i8mm,  // 64-bit ARM: each has the ones before
};

// The best one that this build has, this CPU supports and the operating system saves registers for. DFASTLLM_ISA asks for
// a lesser one by its name; asking for one that is not available is an error at import.
Isa isa();

const char* isa_name();

// One sentence: why this one.
const char* isa_reason();

}  // namespace dfk
