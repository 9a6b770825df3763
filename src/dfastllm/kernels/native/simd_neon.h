// The vocabulary of simd.h on 64-bit ARM: four registers of 128 bits. What every such CPU has, and dot products of
// bytes where the unit is compiled for them: of signed bytes (Armv8.2 with DotProd: Graviton 2, Apple M1), of unsigned and
// signed ones (Armv8.6 with I8MM: Graviton 3, Apple M2), else by widening multiplications.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "isa_here.h"
#include "unroll.h"

namespace dfk::DFK_ISA {

struct Floats16 { float32x4_t v[4]; };
struct Ints16 { int32x4_t v[4]; };
struct Codes16 { uint8x16_t v[4]; };

template <class To, class F> DFK_INLINE To each_quarter(F f) {
  To out;
  DFK_EACH(i, 4) out.v[i] = f(i);
  return out;
}

// Sixteen values from memory, those beyond `count` zero.
template <class T> struct Some {
  T all[16] = {};
  Some(const T* p, int64_t count) { std::memcpy(all, p, static_cast<size_t>(count) * sizeof(T)); }
};

DFK_INLINE Floats16 floats16(float x) { return each_quarter<Floats16>([&](int) { return vdupq_n_f32(x); }); }
DFK_INLINE Ints16 ints16(int32_t x) { return each_quarter<Ints16>([&](int) { return vdupq_n_s32(x); }); }
DFK_INLINE Codes16 codes16(int8_t x) {
  return each_quarter<Codes16>([&](int) { return vdupq_n_u8(static_cast<uint8_t>(x)); });
}
DFK_INLINE Codes16 four_codes(const void* p) {
  uint32x4_t all;
#if defined(__ARM_FEATURE_DOTPROD)
  // dot() reads the first lane alone, and this load takes an offset and no unit of vectors; compilers make a broadcast
  // of what the intrinsics say.
  asm("ldr %s0, %1" : "=w"(all) : "m"(*static_cast<const char(*)[4]>(p)));
#else
  uint32_t four;
  std::memcpy(&four, p, sizeof four);
  all = vdupq_n_u32(four);
#endif
  return each_quarter<Codes16>([&](int) { return vreinterpretq_u8_u32(all); });
}
DFK_INLINE Floats16 load(const float* p) { return each_quarter<Floats16>([&](int i) { return vld1q_f32(p + 4 * i); }); }
DFK_INLINE Floats16 load(const float* p, int64_t count) { return load(Some<float>(p, count).all); }
DFK_INLINE void store(float* p, Floats16 x) {
  DFK_EACH(i, 4) vst1q_f32(p + 4 * i, x.v[i]);
}
DFK_INLINE void store(float* p, Floats16 x, int64_t count) {
  float all[16];
  store(all, x);
  std::memcpy(p, all, static_cast<size_t>(count) * sizeof(float));
}
DFK_INLINE Ints16 load_ints(const int32_t* p) {
  return each_quarter<Ints16>([&](int i) { return vld1q_s32(p + 4 * i); });
}
DFK_INLINE Ints16 load_ints(const int32_t* p, int64_t count) { return load_ints(Some<int32_t>(p, count).all); }
DFK_INLINE void store(int32_t* p, Ints16 x) {
  DFK_EACH(i, 4) vst1q_s32(p + 4 * i, x.v[i]);
}
DFK_INLINE Codes16 load_codes(const void* p) {
  return each_quarter<Codes16>([&](int i) { return vld1q_u8(static_cast<const uint8_t*>(p) + 16 * i); });
}
DFK_INLINE void store(uint8_t* p, Codes16 x) {
  DFK_EACH(i, 4) vst1q_u8(p + 16 * i, x.v[i]);
}
DFK_INLINE Floats16 load_bf16(const uint16_t* p) {
  return each_quarter<Floats16>([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
DFK_INLINE Floats16 load_half(const uint16_t* p) {
  return each_quarter<Floats16>([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
DFK_INLINE Floats16 load_int8(const int8_t* p) {
  const int8x16_t all = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(all)), high = vmovl_high_s8(all);
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))}};
}
DFK_INLINE uint16x8_t low_halves(int32x4_t a, int32x4_t b) {
  return vuzp1q_u16(vreinterpretq_u16_s32(a), vreinterpretq_u16_s32(b));
}
DFK_INLINE void store8(int8_t* p, Ints16 x) {
  const uint8x16_t low = vreinterpretq_u8_u16(low_halves(x.v[0], x.v[1]));
  const uint8x16_t high = vreinterpretq_u8_u16(low_halves(x.v[2], x.v[3]));
  vst1q_s8(p, vreinterpretq_s8_u8(vuzp1q_u8(low, high)));
}
DFK_INLINE void store16(uint16_t* p, Ints16 x) {
  vst1q_u16(p, low_halves(x.v[0], x.v[1]));
  vst1q_u16(p + 8, low_halves(x.v[2], x.v[3]));
}

DFK_INLINE Floats16 operator+(Floats16 x, Floats16 y) {
  return each_quarter<Floats16>([&](int i) { return vaddq_f32(x.v[i], y.v[i]); });
}
DFK_INLINE Floats16 operator-(Floats16 x, Floats16 y) {
  return each_quarter<Floats16>([&](int i) { return vsubq_f32(x.v[i], y.v[i]); });
}
DFK_INLINE Floats16 operator*(Floats16 x, Floats16 y) {
  return each_quarter<Floats16>([&](int i) { return vmulq_f32(x.v[i], y.v[i]); });
}
DFK_INLINE Floats16 operator/(Floats16 x, Floats16 y) {
  return each_quarter<Floats16>([&](int i) { return vdivq_f32(x.v[i], y.v[i]); });
}
// Not vmaxq and vminq, which keep a NaN on either side.
DFK_INLINE float32x4_t greater_of(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
DFK_INLINE Floats16 max(Floats16 x, Floats16 y) {
  return each_quarter<Floats16>([&](int i) { return greater_of(x.v[i], y.v[i]); });
}
DFK_INLINE Floats16 min(Floats16 x, Floats16 y) {
  return each_quarter<Floats16>([&](int i) { return vbslq_f32(vcltq_f32(x.v[i], y.v[i]), x.v[i], y.v[i]); });
}
DFK_INLINE Floats16 fma(Floats16 x, Floats16 y, Floats16 z) {
  return each_quarter<Floats16>([&](int i) { return vfmaq_f32(z.v[i], x.v[i], y.v[i]); });
}
DFK_INLINE Floats16 multiply_add(Floats16 x, Floats16 y, Floats16 z) { return fma(x, y, z); }
DFK_INLINE bool any_greater(Floats16 x, Floats16 y) {
  const uint32x4_t low = vorrq_u32(vcgtq_f32(x.v[0], y.v[0]), vcgtq_f32(x.v[1], y.v[1]));
  const uint32x4_t high = vorrq_u32(vcgtq_f32(x.v[2], y.v[2]), vcgtq_f32(x.v[3], y.v[3]));
  return vmaxvq_u32(vorrq_u32(low, high)) != 0;
}

DFK_INLINE Ints16 operator+(Ints16 x, Ints16 y) {
  return each_quarter<Ints16>([&](int i) { return vaddq_s32(x.v[i], y.v[i]); });
}
DFK_INLINE Ints16 operator-(Ints16 x, Ints16 y) {
  return each_quarter<Ints16>([&](int i) { return vsubq_s32(x.v[i], y.v[i]); });
}
DFK_INLINE Ints16 operator&(Ints16 x, Ints16 y) {
  return each_quarter<Ints16>([&](int i) { return vandq_s32(x.v[i], y.v[i]); });
}
DFK_INLINE Ints16 max(Ints16 x, Ints16 y) {
  return each_quarter<Ints16>([&](int i) { return vmaxq_s32(x.v[i], y.v[i]); });
}
template <int count> DFK_INLINE Ints16 shift_left(Ints16 x) {
  return each_quarter<Ints16>([&](int i) { return vshlq_n_s32(x.v[i], count); });
}
template <int count> DFK_INLINE Ints16 shift_right(Ints16 x) {
  return each_quarter<Ints16>([&](int i) {
    return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(x.v[i]), count));
  });
}
DFK_INLINE Ints16 where_greater(Ints16 a, Ints16 b, Ints16 x, Ints16 y) {
  return each_quarter<Ints16>([&](int i) { return vbslq_s32(vcgtq_s32(a.v[i], b.v[i]), x.v[i], y.v[i]); });
}

DFK_INLINE Floats16 select(uint32_t mask, Floats16 x, Floats16 y) {
  constexpr uint32_t each[4] = {1, 2, 4, 8};
  const uint32x4_t lane = vld1q_u32(each);
  return each_quarter<Floats16>([&](int i) {
    return vbslq_f32(vtstq_u32(vdupq_n_u32(mask >> 4 * i), lane), x.v[i], y.v[i]);
  });
}

DFK_INLINE Codes16 operator&(Codes16 x, Codes16 y) {
  return each_quarter<Codes16>([&](int i) { return vandq_u8(x.v[i], y.v[i]); });
}
DFK_INLINE Codes16 operator|(Codes16 x, Codes16 y) {
  return each_quarter<Codes16>([&](int i) { return vorrq_u8(x.v[i], y.v[i]); });
}
template <int count> DFK_INLINE Codes16 shift_left(Codes16 x) {
  return each_quarter<Codes16>([&](int i) {
    return vreinterpretq_u8_u16(vshlq_n_u16(vreinterpretq_u16_u8(x.v[i]), count));
  });
}
template <int count> DFK_INLINE Codes16 shift_right(Codes16 x) {
  return each_quarter<Codes16>([&](int i) {
    return vreinterpretq_u8_u16(vshrq_n_u16(vreinterpretq_u16_u8(x.v[i]), count));
  });
}
DFK_INLINE Codes16 masked_or(Codes16 a, Codes16 mask, Codes16 b) { return (a & mask) | b; }
DFK_INLINE Codes16 operator-(Codes16 x, Codes16 y) {
  return each_quarter<Codes16>([&](int i) { return vsubq_u8(x.v[i], y.v[i]); });
}
DFK_INLINE Codes16 operator+(Codes16 x, Codes16 y) {
  return each_quarter<Codes16>([&](int i) { return vaddq_u8(x.v[i], y.v[i]); });
}
DFK_INLINE Codes16 four_of_each(const uint8_t* p) {
  const uint8x16_t all = vld1q_u8(p);
  const uint8x16x2_t twice = vzipq_u8(all, all);  // 0 0 1 1 ...
  const uint8x16x2_t low = vzipq_u8(twice.val[0], twice.val[0]), high = vzipq_u8(twice.val[1], twice.val[1]);
  return {{low.val[0], low.val[1], high.val[0], high.val[1]}};
}
DFK_INLINE Codes16 scaled(Codes16 codes, Codes16 factors) {
  return each_quarter<Codes16>([&](int i) { return vmulq_u8(codes.v[i], factors.v[i]); });
}

// Codes as dot() takes them. Without I8MM both of its operands are signed: weights of 8 bits lose their offset of 128 by
// a flipped bit, those of fewer bits are what they are.
#if defined(DFK_SIMD_SIGNED)
DFK_INLINE Codes16 load_wide_codes(const void* p) {
  const Codes16 raw = load_codes(p);
  return each_quarter<Codes16>([&](int i) { return veorq_u8(raw.v[i], vdupq_n_u8(128)); });
}
#endif

#if defined(__ARM_FEATURE_MATMUL_INT8)
DFK_INLINE Ints16 dot(Ints16 sum, Codes16 w, Codes16 x) {
  return each_quarter<Ints16>([&](int i) {
    return vusdotq_laneq_s32(sum.v[i], w.v[i], vreinterpretq_s8_u8(x.v[i]), 0);
  });
}
#elif defined(__ARM_FEATURE_DOTPROD)
DFK_INLINE Ints16 dot(Ints16 sum, Codes16 w, Codes16 x) {
  return each_quarter<Ints16>([&](int i) {
    return vdotq_laneq_s32(sum.v[i], vreinterpretq_s8_u8(w.v[i]), vreinterpretq_s8_u8(x.v[i]), 0);
  });
}
#else
// Two products of 128 * 127 fit 16 bits: inputs 0 and 1, 2 and 3 are added as 32-bit numbers, then these.
DFK_INLINE Ints16 dot(Ints16 sum, Codes16 w, Codes16 x) {
  return each_quarter<Ints16>([&](int i) {
    const int8x16_t a = vreinterpretq_s8_u8(w.v[i]), b = vreinterpretq_s8_u8(x.v[i]);
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return vaddq_s32(sum.v[i], vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
  });
}
#endif

// The sums themselves, which must be there at this point of the program: see linear_sums_dot.h.
DFK_INLINE Ints16 here(Ints16 x) {
  asm volatile("" : "+w"(x.v[0]), "+w"(x.v[1]), "+w"(x.v[2]), "+w"(x.v[3]));
  return x;
}

#if defined(__ARM_FEATURE_MATMUL_INT8)
// Matrix products: 8 inputs of 2 channels times 8 inputs of 2 rows, 4 sums.
struct RowPairs16 { int32x4_t v[8]; };  // channel 2 i of both rows, channel 2 i + 1 of both
struct Eights4 { uint8x16_t v[2]; };    // 8 inputs of each of 4 channels, a quarter of 16

DFK_INLINE Eights4 eight_inputs(Codes16 w, Codes16 next, int quarter) {
  const uint32x4_t a = vreinterpretq_u32_u8(w.v[quarter]), b = vreinterpretq_u32_u8(next.v[quarter]);
  return {{vreinterpretq_u8_u32(vzip1q_u32(a, b)), vreinterpretq_u8_u32(vzip2q_u32(a, b))}};
}
DFK_INLINE RowPairs16 row_pairs(Ints16 first, Ints16 second) {
  RowPairs16 out;
  DFK_EACH(i, 4) {
    out.v[2 * i] = vzip1q_s32(first.v[i], second.v[i]);
    out.v[2 * i + 1] = vzip2q_s32(first.v[i], second.v[i]);
  }
  return out;
}
DFK_INLINE Ints16 first_row(RowPairs16 x) {
  return each_quarter<Ints16>([&](int i) { return vuzp1q_s32(x.v[2 * i], x.v[2 * i + 1]); });
}
DFK_INLINE Ints16 second_row(RowPairs16 x) {
  return each_quarter<Ints16>([&](int i) { return vuzp2q_s32(x.v[2 * i], x.v[2 * i + 1]); });
}
// The sums of a quarter's channels. x: 8 inputs of a row, then 8 of the other.
DFK_INLINE void add_matrix(RowPairs16& sum, Eights4 w, const int8_t* x, int quarter) {
  const int8x16_t rows = vld1q_s8(x);
  DFK_EACH(i, 2) sum.v[2 * quarter + i] = vusmmlaq_s32(sum.v[2 * quarter + i], w.v[i], rows);
  asm volatile("" : "+w"(sum.v[2 * quarter]), "+w"(sum.v[2 * quarter + 1]));  // as here() does
}
#elif !defined(__ARM_FEATURE_DOTPROD)
// Two steps of inputs at once: a product of each fits 16 bits together.
DFK_INLINE Ints16 dot(Ints16 sum, Codes16 w, Codes16 x, Codes16 w_next, Codes16 x_next) {
  return each_quarter<Ints16>([&](int i) {
    const int8x16_t a = vreinterpretq_s8_u8(w.v[i]), b = vreinterpretq_s8_u8(x.v[i]);
    const int8x16_t c = vreinterpretq_s8_u8(w_next.v[i]), d = vreinterpretq_s8_u8(x_next.v[i]);
    const int16x8_t low = vmlal_s8(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vget_low_s8(c), vget_low_s8(d));
    const int16x8_t high = vmlal_high_s8(vmull_high_s8(a, b), c, d);
    return vaddq_s32(sum.v[i], vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
  });
}
#endif

DFK_INLINE Ints16 bits(Floats16 x) {
  return each_quarter<Ints16>([&](int i) { return vreinterpretq_s32_f32(x.v[i]); });
}
DFK_INLINE Floats16 floats(Ints16 x) {
  return each_quarter<Floats16>([&](int i) { return vreinterpretq_f32_s32(x.v[i]); });
}
DFK_INLINE Ints16 to_int(Floats16 x) {  // the instruction itself saturates, and makes 0 of a NaN
  return each_quarter<Ints16>([&](int i) {
    const uint32x4_t fits = vcaltq_f32(x.v[i], vdupq_n_f32(2147483648.0f));
    return vbslq_s32(fits, vcvtq_s32_f32(x.v[i]), vdupq_n_s32(INT32_MIN));
  });
}
DFK_INLINE Floats16 to_float(Ints16 x) {
  return each_quarter<Floats16>([&](int i) { return vcvtq_f32_s32(x.v[i]); });
}
// 2^p itself: the sign and the exponent of x.
DFK_INLINE Floats16 powers(Floats16 x) { return floats(bits(x) & ints16(static_cast<int32_t>(0xff800000u))); }
DFK_INLINE Floats16 times_power(Floats16 a, Floats16 power) { return a * power; }

// The bits of a NaN but for its exponent are its own.
DFK_INLINE Floats16 times_two_to(Floats16 x, Floats16 n) {
  return each_quarter<Floats16>([&](int i) {
    const int32x4_t exponent = vshlq_n_s32(vcvtq_s32_f32(n.v[i]), 23);
    const float32x4_t scaled = vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(x.v[i]), exponent));
    return vbslq_f32(vcltq_f32(n.v[i], vdupq_n_f32(-125.0f)), vdupq_n_f32(0.0f), scaled);
  });
}

DFK_INLINE int32_t highest(Ints16 x) {
  return vmaxvq_s32(vmaxq_s32(vmaxq_s32(x.v[0], x.v[1]), vmaxq_s32(x.v[2], x.v[3])));
}
DFK_INLINE float highest(Floats16 x) {
  const float32x4_t q = greater_of(greater_of(x.v[0], x.v[2]), greater_of(x.v[1], x.v[3]));
  const float32x4_t d = greater_of(q, vextq_f32(q, q, 2));
  return vgetq_lane_f32(greater_of(d, vextq_f32(d, d, 1)), 0);
}
DFK_INLINE float total(Floats16 x) {
  const float32x4_t q = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
  const float32x2_t d = vadd_f32(vget_low_f32(q), vget_high_f32(q));
  return vget_lane_f32(d, 0) + vget_lane_f32(d, 1);
}
DFK_INLINE Ints16 neighbours_added(Ints16 x) {
  const int32x4_t low = vpaddq_s32(x.v[0], x.v[1]), high = vpaddq_s32(x.v[2], x.v[3]);
  return {{low, high, low, high}};
}
DFK_INLINE Floats16 doubled(Floats16 x) {
  const float32x4_t a = x.v[0], b = x.v[1];
  return {{vzip1q_f32(a, a), vzip2q_f32(a, a), vzip1q_f32(b, b), vzip2q_f32(b, b)}};
}
template <int n> DFK_INLINE Floats16 crossed(Floats16 x) {
  if constexpr (n == 1) return each_quarter<Floats16>([&](int i) { return vrev64q_f32(x.v[i]); });
  else if constexpr (n == 2) return each_quarter<Floats16>([&](int i) { return vextq_f32(x.v[i], x.v[i], 2); });
  else return each_quarter<Floats16>([&](int i) { return x.v[i ^ n / 4]; });
}
DFK_INLINE int32_t sum_16(const int8_t* p) { return vaddlvq_s8(vld1q_s8(p)); }

// Weights: two consecutive inputs for each of 16 channels as floats; x: one row's two in every lane. The first of a
// pair is the low half of 32 bits.
struct Bf16Pairs { Floats16 first, second; };
DFK_INLINE Bf16Pairs split_pairs(Ints16 both) {
  return {floats(shift_left<16>(both)), floats(both & ints16(static_cast<int32_t>(0xffff0000u)))};
}
DFK_INLINE Bf16Pairs bf16_pairs(const uint16_t* p) {
  return split_pairs(each_quarter<Ints16>([&](int i) { return vreinterpretq_s32_u16(vld1q_u16(p + 8 * i)); }));
}
DFK_INLINE Bf16Pairs two_bf16(const uint16_t* p) {
  int32_t both;
  std::memcpy(&both, p, sizeof both);
  return split_pairs(ints16(both));
}
DFK_INLINE Floats16 add_bf16_pairs(Floats16 sum, const Bf16Pairs& w, const Bf16Pairs& x) {
  return fma(x.second, w.second, fma(x.first, w.first, sum));
}

}  // namespace dfk::DFK_ISA
