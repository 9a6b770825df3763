// The vocabulary of simd.h without intrinsics: four vectors of 128 bits, which GCC and Clang map to the baseline of any
// CPU (SSE2, NEON, or plain code). Also what a new instruction set may take over operation by operation.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "isa_here.h"
#include "unroll.h"

namespace dfk::DFK_ISA {

using Float4 = float __attribute__((vector_size(16)));
using Int4 = int32_t __attribute__((vector_size(16)));
using Unsigned4 = uint32_t __attribute__((vector_size(16)));
using Short8 = int16_t __attribute__((vector_size(16)));
using UnsignedShort8 = uint16_t __attribute__((vector_size(16)));
using UnsignedByte16 = uint8_t __attribute__((vector_size(16)));

struct Floats16 { Float4 v[4]; };
struct Ints16 { Int4 v[4]; };
struct Codes16 { UnsignedShort8 v[4]; };

// The same bits as another type of the same size.
template <class To, class From> inline To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "other sizes have other bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class To, class F> inline To each_quarter(F f) {
  To out;
  DFK_EACH(i, 4) out.v[i] = f(i);
  return out;
}

// a * b + c, rounded once: the product of two floats is exact as a double, and the sum is rounded to odd first (Boldo and
// Melquiond, 2008), after which rounding to float gives what one rounding gives.
inline float fused(float a, float b, float c) {
#if defined(__FP_FAST_FMAF)
  return std::fma(a, b, c);
#else
  const double product = static_cast<double>(a) * b, sum = product + c, back = sum - product;
  const double lost = (product - (sum - back)) + (c - back);
  uint64_t raw = same_bits<uint64_t>(sum);
  if ((lost > 0 || lost < 0) && (raw & 1) == 0) raw += (lost > 0) == (sum > 0) ? 1 : -1;
  return static_cast<float>(same_bits<double>(raw));
#endif
}

// IEEE half to float.
inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 0) {  // zero and denormals
    return same_bits<float>(same_bits<uint32_t>(static_cast<float>(fraction) * 0x1p-24f) | sign);
  }
  return same_bits<float>(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}

inline Floats16 floats16(float x) { return each_quarter<Floats16>([&](int) { return Float4{x, x, x, x}; }); }
inline Ints16 ints16(int32_t x) { return each_quarter<Ints16>([&](int) { return Int4{x, x, x, x}; }); }
inline Codes16 four_codes(const void* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return same_bits<Codes16>(ints16(four));
}
inline Codes16 codes16(int8_t x) { return same_bits<Codes16>(ints16(static_cast<uint8_t>(x) * 0x01010101)); }
template <class To, class From> inline To load_64(const From* p) {
  To out;
  std::memcpy(&out, p, sizeof out);
  return out;
}
template <class To, class From> inline To load_some(const From* p, int64_t count) {
  From all[16] = {};
  std::memcpy(all, p, static_cast<size_t>(count) * sizeof(From));
  return load_64<To>(all);
}
inline Floats16 load(const float* p) { return load_64<Floats16>(p); }
inline Floats16 load(const float* p, int64_t count) { return load_some<Floats16>(p, count); }
inline Ints16 load_ints(const int32_t* p) { return load_64<Ints16>(p); }
inline Ints16 load_ints(const int32_t* p, int64_t count) { return load_some<Ints16>(p, count); }
inline Codes16 load_codes(const void* p) { return load_64<Codes16>(static_cast<const uint8_t*>(p)); }
inline void store(float* p, Floats16 x) { std::memcpy(p, &x, sizeof x); }
inline void store(float* p, Floats16 x, int64_t count) { std::memcpy(p, &x, static_cast<size_t>(count) * sizeof(float)); }
inline void store(int32_t* p, Ints16 x) { std::memcpy(p, &x, sizeof x); }
inline void store(uint8_t* p, Codes16 x) { std::memcpy(p, &x, sizeof x); }
inline Floats16 load_bf16(const uint16_t* p) {
  uint32_t wide[16];
  for (int i = 0; i < 16; ++i) wide[i] = static_cast<uint32_t>(p[i]) << 16;
  return load_64<Floats16>(wide);
}
inline Floats16 load_half(const uint16_t* p) {
  float wide[16];
  for (int i = 0; i < 16; ++i) wide[i] = half_to_float(p[i]);
  return load(wide);
}
inline Floats16 load_int8(const int8_t* p) {
  float wide[16];
  for (int i = 0; i < 16; ++i) wide[i] = p[i];
  return load(wide);
}
inline void store8(int8_t* p, Ints16 a) {
  int32_t wide[16];
  store(wide, a);
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(wide[i]);
}
inline void store16(uint16_t* p, Ints16 a) {
  int32_t wide[16];
  store(wide, a);
  for (int i = 0; i < 16; ++i) p[i] = static_cast<uint16_t>(wide[i]);
}

inline Floats16 operator+(Floats16 a, Floats16 b) { return each_quarter<Floats16>([&](int i) { return a.v[i] + b.v[i]; }); }
inline Floats16 operator-(Floats16 a, Floats16 b) { return each_quarter<Floats16>([&](int i) { return a.v[i] - b.v[i]; }); }
inline Floats16 operator*(Floats16 a, Floats16 b) { return each_quarter<Floats16>([&](int i) { return a.v[i] * b.v[i]; }); }
inline Floats16 operator/(Floats16 a, Floats16 b) { return each_quarter<Floats16>([&](int i) { return a.v[i] / b.v[i]; }); }
inline Floats16 max(Floats16 a, Floats16 b) {
  return each_quarter<Floats16>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Floats16 min(Floats16 a, Floats16 b) {
  return each_quarter<Floats16>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Floats16 fma(Floats16 a, Floats16 b, Floats16 c) {
  return each_quarter<Floats16>([&](int i) {
    Float4 out;
    for (int j = 0; j < 4; ++j) out[j] = fused(a.v[i][j], b.v[i][j], c.v[i][j]);
    return out;
  });
}
inline Floats16 multiply_add(Floats16 a, Floats16 b, Floats16 c) {
#if defined(__FP_FAST_FMAF)
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}
inline bool any_greater(Floats16 a, Floats16 b) {
  const Int4 found = (a.v[0] > b.v[0]) | (a.v[1] > b.v[1]) | (a.v[2] > b.v[2]) | (a.v[3] > b.v[3]);
  return (found[0] | found[1] | found[2] | found[3]) != 0;
}

// Signed numbers go through unsigned ones, which may wrap around.
template <class F> inline Ints16 wrapping(Ints16 a, Ints16 b, F f) {
  return each_quarter<Ints16>([&](int i) { return (Int4)f((Unsigned4)a.v[i], (Unsigned4)b.v[i]); });
}
inline Ints16 operator+(Ints16 a, Ints16 b) {
  return wrapping(a, b, [](Unsigned4 x, Unsigned4 y) { return x + y; });
}
inline Ints16 operator-(Ints16 a, Ints16 b) {
  return wrapping(a, b, [](Unsigned4 x, Unsigned4 y) { return x - y; });
}
inline Ints16 operator&(Ints16 a, Ints16 b) { return each_quarter<Ints16>([&](int i) { return a.v[i] & b.v[i]; }); }
inline Ints16 max(Ints16 a, Ints16 b) {
  return each_quarter<Ints16>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
template <int count> inline Ints16 shift_left(Ints16 a) {
  return each_quarter<Ints16>([&](int i) { return (Int4)((Unsigned4)a.v[i] << count); });
}
template <int count> inline Ints16 shift_right(Ints16 a) {
  return each_quarter<Ints16>([&](int i) { return (Int4)((Unsigned4)a.v[i] >> count); });
}
inline Ints16 where_greater(Ints16 a, Ints16 b, Ints16 x, Ints16 y) {
  return each_quarter<Ints16>([&](int i) { return a.v[i] > b.v[i] ? x.v[i] : y.v[i]; });
}

inline Floats16 select(uint32_t mask, Floats16 a, Floats16 b) {
  const Int4 lane = {1, 2, 4, 8};
  return each_quarter<Floats16>([&](int i) {
    const int32_t x = static_cast<int32_t>(mask >> 4 * i);
    const Int4 set = (Int4{x, x, x, x} & lane) == lane;
    return set ? a.v[i] : b.v[i];
  });
}

inline Codes16 operator&(Codes16 a, Codes16 b) { return each_quarter<Codes16>([&](int i) { return a.v[i] & b.v[i]; }); }
inline Codes16 operator|(Codes16 a, Codes16 b) { return each_quarter<Codes16>([&](int i) { return a.v[i] | b.v[i]; }); }
template <int count> inline Codes16 shift_left(Codes16 a) {
  return each_quarter<Codes16>([&](int i) { return a.v[i] << count; });
}
template <int count> inline Codes16 shift_right(Codes16 a) {
  return each_quarter<Codes16>([&](int i) { return a.v[i] >> count; });
}
inline Codes16 masked_or(Codes16 a, Codes16 mask, Codes16 b) { return (a & mask) | b; }
// Bytes, through vectors of them.
template <class F> inline Codes16 bytewise(Codes16 a, Codes16 b, F f) {
  return each_quarter<Codes16>([&](int i) { return (UnsignedShort8)f((UnsignedByte16)a.v[i], (UnsignedByte16)b.v[i]); });
}
inline Codes16 operator-(Codes16 a, Codes16 b) {
  return bytewise(a, b, [](UnsignedByte16 x, UnsignedByte16 y) { return x - y; });
}
inline Codes16 operator+(Codes16 a, Codes16 b) {
  return bytewise(a, b, [](UnsignedByte16 x, UnsignedByte16 y) { return x + y; });
}
inline Codes16 four_of_each(const uint8_t* p) {
  uint8_t all[64];
  for (int i = 0; i < 64; ++i) all[i] = p[i / 4];
  return load_codes(all);
}
inline Codes16 scaled(Codes16 codes, Codes16 factors) {
  return bytewise(codes, factors, [](UnsignedByte16 x, UnsignedByte16 y) { return x * y; });
}
// A product of two bytes fits 16 bits, the sum of two does not: inputs 0 and 2 are even bytes, 1 and 3 odd ones, and their
// products are widened where they stand.
inline Ints16 dot(Ints16 sum, Codes16 w, Codes16 x) {
  return each_quarter<Ints16>([&](int i) {
    const Short8 x_even = (Short8)(x.v[i] << 8) >> 8, x_odd = (Short8)x.v[i] >> 8;
    const Int4 even = (Int4)((Short8)(w.v[i] & 255) * x_even), odd = (Int4)((Short8)(w.v[i] >> 8) * x_odd);
    const Int4 low = ((Int4)((Unsigned4)even << 16) >> 16) + ((Int4)((Unsigned4)odd << 16) >> 16);
    return sum.v[i] + low + (even >> 16) + (odd >> 16);
  });
}

inline Ints16 bits(Floats16 a) { return same_bits<Ints16>(a); }
inline Floats16 floats(Ints16 a) { return same_bits<Floats16>(a); }
inline Ints16 to_int(Floats16 a) {  // out of range as on x86, where C++ leaves it undefined
  return each_quarter<Ints16>([&](int i) {
    Int4 out;
    for (int j = 0; j < 4; ++j) {
      const float x = a.v[i][j];
      out[j] = x > -2147483648.0f && x < 2147483648.0f ? static_cast<int32_t>(x) : INT32_MIN;
    }
    return out;
  });
}
inline Floats16 to_float(Ints16 a) {
  return each_quarter<Floats16>([&](int i) { return __builtin_convertvector(a.v[i], Float4); });
}
// 2^p itself: the sign and the exponent of x.
inline Floats16 powers(Floats16 x) { return floats(bits(x) & ints16(static_cast<int32_t>(0xff800000u))); }
inline Floats16 times_power(Floats16 a, Floats16 power) { return a * power; }

inline Floats16 times_two_to(Floats16 a, Floats16 n) {
  const Floats16 shifted = n + floats16(12582912.0f);  // its low bits are n
  const Floats16 scaled = floats(bits(a) + shift_left<23>(bits(shifted)));
  return each_quarter<Floats16>([&](int i) {
    const Float4 low = {-125.0f, -125.0f, -125.0f, -125.0f}, x = a.v[i];
    return x != x ? x : n.v[i] < low ? Float4{} : scaled.v[i];
  });
}

template <class V> inline auto highest(V x) {
  auto best = x.v[0][0];
  for (int i = 1; i < 16; ++i) best = best > x.v[i / 4][i % 4] ? best : x.v[i / 4][i % 4];
  return best;
}
inline float total(Floats16 x) {
  const Float4 q = (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]);
  return (q[0] + q[2]) + (q[1] + q[3]);
}
inline Ints16 neighbours_added(Ints16 x) {
  int32_t from[16], to[16] = {};
  store(from, x);
  for (int i = 0; i < 8; ++i) to[i] = from[2 * i] + from[2 * i + 1];
  return load_ints(to);
}
inline Floats16 doubled(Floats16 x) {
  float from[16], to[16];
  store(from, x);
  for (int i = 0; i < 16; ++i) to[i] = from[i / 2];
  return load(to);
}
template <int n> inline Floats16 crossed(Floats16 x) {
  float from[16], to[16];
  store(from, x);
  for (int i = 0; i < 16; ++i) to[i] = from[i ^ n];
  return load(to);
}
inline int32_t sum_16(const int8_t* p) {
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += p[i];
  return sum;
}

// Weights: two consecutive inputs for each of 16 channels as floats; x: one row's two in every lane. The first of a pair
// is the low half of 32 bits.
struct Bf16Pairs { Floats16 first, second; };
inline Bf16Pairs split_pairs(Ints16 both) {
  return {floats(shift_left<16>(both)), floats(both & ints16(static_cast<int32_t>(0xffff0000u)))};
}
inline Bf16Pairs bf16_pairs(const uint16_t* p) { return split_pairs(load_64<Ints16>(p)); }
inline Bf16Pairs two_bf16(const uint16_t* p) { return split_pairs(same_bits<Ints16>(four_codes(p))); }
inline Floats16 add_bf16_pairs(Floats16 sum, const Bf16Pairs& w, const Bf16Pairs& x) {
  return multiply_add(x.second, w.second, multiply_add(x.first, w.first, sum));
}

}  // namespace dfk::DFK_ISA
