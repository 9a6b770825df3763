// Sixteen lanes at a time, on whatever registers the translation unit is compiled for (isa_here.h): one of 512 bits, two
// of 256, or four of 128. This is the vocabulary in which all kernels are written; intrinsics stand in the
// simd_*.h files alone, and a new instruction set is a new one of them.
//
//   Floats16   16 float32
//   Ints16     16 int32: sums of products, bits of floats
//   Codes16    16 x 4 bytes: codes of 4 consecutive inputs for each of 16 output channels, or one row's 4 in every lane
//   Pairs16    16 x 2 int16: sums of two products (AVX2 without VNNI)
//
// Every operation is exact or rounds once, so code written in it gives the same bits on every instruction set. The two
// exceptions say so: multiply_add, which is for float weights only, and add_bf16_pairs.
//
// What a simd_*.h file defines, beside the types (p: any alignment; count: 0 to 16):
//   floats16(x), ints16(x), codes16(byte)                one value in every lane or byte
//   four_codes(p)                                        4 bytes in every lane
//   load(p), load(p, count), store(p, x), store(p, x, count)   float32; what is beyond count is zero, or left alone
//   load_ints(p), load_ints(p, count), store(p, ints)    int32
//   load_codes(p), store(p, codes)                       64 bytes
//   load_bf16(p), load_half(p), load_int8(p)             bfloat16 and float16 bits, signed bytes, as floats
//   store8(p, ints), store16(p, ints)                    the low byte, half of each; store16: of 0 to 65535
//   + - * / max min                                      Floats16; max, min of a NaN and a number: the second operand
//   + - & max                                            Ints16 (sums wrap around)
//   & |                                                  Codes16
//   + -                                                  Codes16, byte by byte, wrapping around
//   four_of_each(p)                                      16 bytes, each in all four of its lane
//   scaled(codes, factors)                               products of bytes, none above 255; factors: alike in all four of a lane
//   shift_left<n>, shift_right<n>                        Ints16, zeros come in; Codes16: within every 16 bits
//   masked_or(a, mask, b)                                (a & mask) | b, Codes16
//   bits(floats), floats(ints)                           the same 32 bits
//   to_int(floats)                                       towards zero; INT_MIN where it does not fit
//   to_float(ints)                                       nearest, ties to even
//   where_greater(a, b, x, y)                            a > b ? x : y, Ints16
//   select(mask, a, b)                                   lane i of a where bit i of the mask is set, else of b
//   any_greater(a, b)                                    of any lane; a NaN is not greater
//   fma(a, b, c)                                         a * b + c, rounded once
//   multiply_add(a, b, c)                                fma where the hardware has it, else rounded twice
//   powers(floats), times_power(a, power)                see below
//   times_two_to(a, n)                                   a * 2^n, n whole, a of 0.7 to 1.5; n below -125: 0 or what it is;
//                                                        a NaN stays a NaN
//   highest(x), total(floats)                            of all lanes; total: halves, quarters, ... in that order
//   neighbours_added(ints)                               lanes 0 + 1, 2 + 3, ... in lanes 0 to 7; above them anything
//   doubled(floats)                                      lanes 0, 0, 1, 1, ... 7, 7
//   crossed<n>(floats)                                   lane i: what lane i ^ n holds; n is 1, 2, 4 or 8
//   sum_16(p)                                            of 16 int8
//   dot(sum, w, x)          (DFK_SIMD_DOT)               sum + 4 products of every lane, w unsigned, x signed bytes
//   load_wide_codes(p)      (DFK_SIMD_SIGNED)            64 bytes with an offset of 128, without it: for a dot of signed bytes
//   dot(sum, w, x, w_next, x_next)  (DFK_SIMD_DOT_TWICE) both at once
//   eight_inputs, add_matrix, ...   (DFK_SIMD_MATRIX)    see simd_neon.h
//   pair_products(w, x), widened(pairs, factors), ...    (AVX2 without it, see there)
//   Bf16Pairs, add_bf16_pairs                            products of bfloat16 pairs, see linear_float.h
//   zip(p, q)               (DFK_SIMD_PAIRS)             the pairs p[i], q[i] of two times 16 bfloat16
//   zip_halves(p)           (DFK_SIMD_PAIRS)             zip(p, p + 16)
//   exact_pairs(a, b)       (DFK_SIMD_PAIRS)             the same of floats that are bfloat16 numbers
//   store_bf16(p, floats)   (DFK_SIMD_PAIRS)             rounded to bfloat16; -> what was stored, as floats
//
// times_power(a, power) is a * 2^p, where powers(x) is made of the x = {1, 1.25, 1.5, 1.75} * 2^p that activation scales
// are. x of 0: times zero. x of NaN, which goes with sums of zero: NaN.
#pragma once

#include "isa_here.h"

#if defined(DFK_SIMD_AVX512)
#include "simd_avx512.h"
#elif defined(DFK_SIMD_AVX2)
#include "simd_avx2.h"
#elif defined(DFK_SIMD_NEON)
#include "simd_neon.h"
#else
#include "simd_portable.h"
#endif

#include <cstdint>

namespace dfk::DFK_ISA {

// The first 16 of `left`, or as many as there are.
inline Floats16 load_up_to(const float* p, int64_t left) { return left >= 16 ? load(p) : load(p, left); }
inline void store_up_to(float* p, Floats16 x, int64_t left) {
  if (left >= 16) store(p, x);
  else store(p, x, left);
}

constexpr int32_t kInfinityBits = 0x7f800000;  // |x| as an integer: above it NaN, below it finite, ordered as |x|

inline Ints16 abs_bits(Floats16 x) { return bits(x) & ints16(0x7fffffff); }

// The nearest integer as a float, ties to even, |x| < 2^22: beyond 2^23 a float has no fraction bits left.
inline Floats16 round_even(Floats16 x) {
  const Floats16 shift = floats16(12582912.0f);  // 1.5 * 2^23
  return (x + shift) - shift;
}

// e^x within 2 ulp for x in [-86.6, 88.3]; outside of it, and for NaN, some number.
inline Floats16 exp_inside(Floats16 x) {
  const Floats16 shift = floats16(12582912.0f);  // 1.5 * 2^23: after the addition the integer part is in the low bits
  const Floats16 shifted = fma(x, floats16(1.44269504f), shift);
  const Floats16 n = shifted - shift;
  // ln 2 in two parts: n * the first is exact (it has 15 significant bits, n at most 8).
  const Floats16 r = fma(n, floats16(-1.42860677e-6f), fma(n, floats16(-0.693145752f), x));
  Floats16 p = floats16(1.3888889e-3f);
  p = fma(p, r, floats16(8.3333333e-3f));
  p = fma(p, r, floats16(4.1666667e-2f));
  p = fma(p, r, floats16(1.6666667e-1f));
  p = fma(p, r, floats16(0.5f));
  p = fma(p, r, floats16(1.0f));
  p = fma(p, r, floats16(1.0f));
  return floats(bits(p) + shift_left<23>(bits(shifted)));  // times 2^n
}

constexpr float kLowestExponent = -86.6f;

// e^x; below -86.6 e^-86.6 (2.5e-38), above 88.3 e^88.3 (2.2e38).
inline Floats16 exp(Floats16 x) { return exp_inside(max(min(x, floats16(88.3f)), floats16(kLowestExponent))); }

}  // namespace dfk::DFK_ISA
