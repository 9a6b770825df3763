// Which instruction set this translation unit is compiled for, as its flags say. Kernels live in the namespace
// dfk::DFK_ISA: the linker must never give one instruction set's copy of an inline function to another's, which may have
// to run on a CPU without it. So code of two units is shared only where both are compiled with the same flags.
#pragma once

#if defined(__AVX512BF16__)
#define DFK_ISA avx512
#define DFK_SIMD_AVX512
#define DFK_SIMD_DOT  // the vocabulary has dot(): 4 products of bytes are added to a lane
#elif defined(__AVXVNNI__)
#define DFK_ISA avxvnni
#define DFK_SIMD_AVX2
#define DFK_SIMD_DOT  // 4 products of bytes are added to a lane in one instruction
#elif defined(__AVX512VNNI__)
#define DFK_ISA avx512vl  // the same vpdpbusd on 256 bits, encoded as AVX-512VL
#define DFK_SIMD_AVX2
#define DFK_SIMD_DOT
#elif defined(__AVX2__)
#define DFK_ISA avx2
#define DFK_SIMD_AVX2
#else
#define DFK_ISA scalar
#define DFK_SIMD_PORTABLE
#define DFK_SIMD_DOT
#endif
