// Which instruction set this translation unit is compiled for, as its flags say. Kernels live in the namespace
// dfk::DFK_ISA: the linker must never give one instruction set's copy of an inline function to another's, which may have
// to run on a CPU without it. So code of two units is shared only where both are compiled with the same flags.
#pragma once

#if defined(DFK_PORTABLE)  // a unit may ask for it, whatever its flags allow
#define DFK_ISA scalar
#define DFK_SIMD_PORTABLE
#define DFK_SIMD_DOT
#elif defined(__AVX512BF16__)
#define DFK_ISA avx512
#define DFK_SIMD_AVX512
#define DFK_SIMD_DOT  // the vocabulary has dot(): 4 products of bytes are added to a lane
#define DFK_SIMD_PAIRS  // and instructions for pairs of bfloat16, twice as fast as floats
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
#elif defined(__ARM_FEATURE_MATMUL_INT8)
#define DFK_ISA i8mm
#define DFK_SIMD_NEON
#define DFK_SIMD_DOT
#define DFK_SIMD_MATRIX  // and matrix products of 2 channels and 2 rows
#elif defined(__ARM_FEATURE_DOTPROD)
#define DFK_ISA dotprod
#define DFK_SIMD_NEON
#define DFK_SIMD_DOT
#define DFK_SIMD_SIGNED  // dot() takes signed weights
#elif defined(__aarch64__)
#define DFK_ISA neon
#define DFK_SIMD_NEON
#define DFK_SIMD_DOT
#define DFK_SIMD_SIGNED
#define DFK_SIMD_DOT_TWICE  // and two steps at once
#else
#define DFK_ISA scalar
#define DFK_SIMD_PORTABLE
#define DFK_SIMD_DOT
#endif
