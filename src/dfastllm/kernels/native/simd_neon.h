// The vocabulary of simd.h on 64-bit ARM: four registers of 128 bits. What every such CPU has, and dot products of bytes
// where the unit is compiled for them: of signed bytes (Armv8.2 with DotProd: Graviton 2, Apple M1), of unsigned and
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

template <class To, class F> inline To each_quarter(F f) {
  To out;
  DFK_EACH(i, 4) out.v[i] = f(i);
  return out;
}

// Sixteen values from memory, those beyond `count` zero.
template <class T> struct Some {
  T all[16] = {};
  Some(const T* p, int64_t count) { std::memcpy(all, p, static_cast<size_t>(count) * sizeof(T)); }
};

inline Floats16 floats16(float x) { return each_quarter<Floats16>([&](int) { return vdupq_n_f32(x); }); }
inline Ints16 ints16(int32_t x) { return each_quarter<Ints16>([&](int) { return vdupq_n_s32(x); }); }
inline Codes16 codes16(int8_t x) {
  return each_quarter<Codes16>([&](int) { return vdupq_n_u8(static_cast<uint8_t>(x)); });
}
inline Codes16 four_codes(const void* p) {
  uint32_t four;
  std::memcpy(&four, p, sizeof four);
  return each_quarter<Codes16>([&](int) { return vreinterpretq_u8_u32(vdupq_n_u32(four)); });
}
inline Floats16 load(const float* p) { return each_quarter<Floats16>([&](int i) { return vld1q_f32(p + 4 * i); }); }
inline Floats16 load(const float* p, int64_t count) { return load(Some<float>(p, count).all); }
inline void store(float* p, Floats16 x) {
  DFK_EACH(i, 4) vst1q_f32(p + 4 * i, x.v[i]);
}
inline void store(float* p, Floats16 x, int64_t count) {
  float all[16];
  store(all, x);
  std::memcpy(p, all, static_cast<size_t>(count) * sizeof(float));
}
inline Ints16 load_ints(const int32_t* p) { return each_quarter<Ints16>([&](int i) { return vld1q_s32(p + 4 * i); }); }
inline Ints16 load_ints(const int32_t* p, int64_t count) { return load_ints(Some<int32_t>(p, count).all); }
inline void store(int32_t* p, Ints16 x) {
  DFK_EACH(i, 4) vst1q_s32(p + 4 * i, x.v[i]);
}
inline Codes16 load_codes(const void* p) {
  return each_quarter<Codes16>([&](int i) { return vld1q_u8(static_cast<const uint8_t*>(p) + 16 * i); });
}
inline void store(uint8_t* p, Codes16 x) {
  DFK_EACH(i, 4) vst1q_u8(p + 16 * i, x.v[i]);
}
inline Floats16 load_bf16(const uint16_t* p) {
  return each_quarter<Floats16>([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
inline Floats16 load_half(const uint16_t* p) {
  return each_quarter<Floats16>([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
inline uint16x8_t low_halves(int32x4_t a, int32x4_t b) {
  return vuzp1q_u16(vreinterpretq_u16_s32(a), vreinterpretq_u16_s32(b));
}
inline void store8(int8_t* p, Ints16 x) {
  const uint8x16_t low = vreinterpretq_u8_u16(low_halves(x.v[0], x.v[1]));
  const uint8x16_t high = vreinterpretq_u8_u16(low_halves(x.v[2], x.v[3]));
  vst1q_s8(p, vreinterpretq_s8_u8(vuzp1q_u8(low, high)));
}
inline void store16(uint16_t* p, Ints16 x) {
  vst1q_u16(p, low_halves(x.v[0], x.v[1]));
  vst1q_u16(p + 8, low_halves(x.v[2], x.v[3]));
}

inline Floats16 operator+(Floats16 x, Floats16 y) {
  return each_quarter<Floats16>([&](int i) { return vaddq_f32(x.v[i], y.v[i]); });
}
inline Floats16 operator-(Floats16 x, Floats16 y) {
  return each_quarter<Floats16>([&](int i) { return vsubq_f32(x.v[i], y.v[i]); });
}
inline Floats16 operator*(Floats16 x, Floats16 y) {
  return each_quarter<Floats16>([&](int i) { return vmulq_f32(x.v[i], y.v[i]); });
}
inline Floats16 operator/(Floats16 x, Floats16 y) {
  return each_quarter<Floats16>([&](int i) { return vdivq_f32(x.v[i], y.v[i]); });
}
// Not vmaxq and vminq, which keep a NaN on either side.
inline float32x4_t greater_of(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
inline Floats16 max(Floats16 x, Floats16 y) {
  return each_quarter<Floats16>([&](int i) { return greater_of(x.v[i], y.v[i]); });
}
inline Floats16 min(Floats16 x, Floats16 y) {
  return each_quarter<Floats16>([&](int i) { return vbslq_f32(vcltq_f32(x.v[i], y.v[i]), x.v[i], y.v[i]); });
}
inline Floats16 fma(Floats16 x, Floats16 y, Floats16 z) {
  return each_quarter<Floats16>([&](int i) { return vfmaq_f32(z.v[i], x.v[i], y.v[i]); });
}
inline Floats16 multiply_add(Floats16 x, Floats16 y, Floats16 z) { return fma(x, y, z); }
inline bool any_greater(Floats16 x, Floats16 y) {
  const uint32x4_t low = vorrq_u32(vcgtq_f32(x.v[0], y.v[0]), vcgtq_f32(x.v[1], y.v[1]));
  const uint32x4_t high = vorrq_u32(vcgtq_f32(x.v[2], y.v[2]), vcgtq_f32(x.v[3], y.v[3]));
  return vmaxvq_u32(vorrq_u32(low, high)) != 0;
}

inline Ints16 operator+(Ints16 x, Ints16 y) {
  return each_quarter<Ints16>([&](int i) { return vaddq_s32(x.v[i], y.v[i]); });
}
inline Ints16 operator-(Ints16 x, Ints16 y) {
  return each_quarter<Ints16>([&](int i) { return vsubq_s32(x.v[i], y.v[i]); });
}
inline Ints16 operator&(Ints16 x, Ints16 y) {
  return each_quarter<Ints16>([&](int i) { return vandq_s32(x.v[i], y.v[i]); });
}
inline Ints16 max(Ints16 x, Ints16 y) {
  return each_quarter<Ints16>([&](int i) { return vmaxq_s32(x.v[i], y.v[i]); });
}
template <int count> inline Ints16 shift_left(Ints16 x) {
  return each_quarter<Ints16>([&](int i) { return vshlq_n_s32(x.v[i], count); });
}
template <int count> inline Ints16 shift_right(Ints16 x) {
  return each_quarter<Ints16>([&](int i) {
    return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(x.v[i]), count));
  });
}
inline Ints16 where_greater(Ints16 a, Ints16 b, Ints16 x, Ints16 y) {
  return each_quarter<Ints16>([&](int i) { return vbslq_s32(vcgtq_s32(a.v[i], b.v[i]), x.v[i], y.v[i]); });
}

inline Codes16 operator&(Codes16 x, Codes16 y) {
  return each_quarter<Codes16>([&](int i) { return vandq_u8(x.v[i], y.v[i]); });
}
inline Codes16 operator|(Codes16 x, Codes16 y) {
  return each_quarter<Codes16>([&](int i) { return vorrq_u8(x.v[i], y.v[i]); });
}
template <int count> inline Codes16 shift_left(Codes16 x) {
  return each_quarter<Codes16>([&](int i) {
    return vreinterpretq_u8_u16(vshlq_n_u16(vreinterpretq_u16_u8(x.v[i]), count));
  });
}
template <int count> inline Codes16 shift_right(Codes16 x) {
  return each_quarter<Codes16>([&](int i) {
    return vreinterpretq_u8_u16(vshrq_n_u16(vreinterpretq_u16_u8(x.v[i]), count));
  });
}
inline Codes16 masked_or(Codes16 a, Codes16 mask, Codes16 b) { return (a & mask) | b; }

// Codes as dot() takes them. Without I8MM both of its operands are signed: weights of 8 bits lose their offset of 128 by a
// flipped bit, those of fewer bits are what they are.
#if defined(DFK_SIMD_SIGNED)
inline Codes16 load_wide_codes(const void* p) {
  const Codes16 raw = load_codes(p);
  return each_quarter<Codes16>([&](int i) { return veorq_u8(raw.v[i], vdupq_n_u8(128)); });
}
#endif

#if defined(__ARM_FEATURE_MATMUL_INT8)
inline Ints16 dot(Ints16 sum, Codes16 w, Codes16 x) {
  return each_quarter<Ints16>([&](int i) { return vusdotq_s32(sum.v[i], w.v[i], vreinterpretq_s8_u8(x.v[i])); });
}
#elif defined(__ARM_FEATURE_DOTPROD)
inline Ints16 dot(Ints16 sum, Codes16 w, Codes16 x) {
  return each_quarter<Ints16>([&](int i) {
    return vdotq_s32(sum.v[i], vreinterpretq_s8_u8(w.v[i]), vreinterpretq_s8_u8(x.v[i]));
  });
}
#else
// Two products of 128 * 127 fit 16 bits: inputs 0 and 1, 2 and 3 are added as 32-bit numbers, then these.
inline Ints16 dot(Ints16 sum, Codes16 w, Codes16 x) {
  return each_quarter<Ints16>([&](int i) {
    const int8x16_t a = vreinterpretq_s8_u8(w.v[i]), b = vreinterpretq_s8_u8(x.v[i]);
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return vaddq_s32(sum.v[i], vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
  });
}
#endif

#if defined(__ARM_FEATURE_MATMUL_INT8)
// Matrix products: 8 inputs of 2 channels times 8 inputs of 2 rows, 4 sums. Of 16 channels, in their order:
struct Eights16 { uint8x16_t v[8]; };  // 8 inputs of channels 2 i and 2 i + 1
struct RowPairs16 { int32x4_t v[8]; };  // sums: channel 2 i of both rows, channel 2 i + 1 of both

inline Eights16 eight_inputs(Codes16 w, Codes16 next) {
  Eights16 out;
  DFK_EACH(i, 4) {
    const uint32x4_t a = vreinterpretq_u32_u8(w.v[i]), b = vreinterpretq_u32_u8(next.v[i]);
    out.v[2 * i] = vreinterpretq_u8_u32(vzip1q_u32(a, b));
    out.v[2 * i + 1] = vreinterpretq_u8_u32(vzip2q_u32(a, b));
  }
  return out;
}
inline RowPairs16 row_pairs(Ints16 first, Ints16 second) {
  RowPairs16 out;
  DFK_EACH(i, 4) {
    out.v[2 * i] = vzip1q_s32(first.v[i], second.v[i]);
    out.v[2 * i + 1] = vzip2q_s32(first.v[i], second.v[i]);
  }
  return out;
}
inline Ints16 first_row(RowPairs16 x) {
  return each_quarter<Ints16>([&](int i) { return vuzp1q_s32(x.v[2 * i], x.v[2 * i + 1]); });
}
inline Ints16 second_row(RowPairs16 x) {
  return each_quarter<Ints16>([&](int i) { return vuzp2q_s32(x.v[2 * i], x.v[2 * i + 1]); });
}
// x: 8 inputs of a row, then 8 of the other.
inline RowPairs16 add_matrix(RowPairs16 sum, Eights16 w, const int8_t* x) {
  const int8x16_t rows = vld1q_s8(x);
  DFK_EACH(i, 8) sum.v[i] = vusmmlaq_s32(sum.v[i], w.v[i], rows);
  return sum;
}
#elif !defined(__ARM_FEATURE_DOTPROD)
// Two steps of inputs at once: a product of each fits 16 bits together.
inline Ints16 dot(Ints16 sum, Codes16 w, Codes16 x, Codes16 w_next, Codes16 x_next) {
  return each_quarter<Ints16>([&](int i) {
    const int8x16_t a = vreinterpretq_s8_u8(w.v[i]), b = vreinterpretq_s8_u8(x.v[i]);
    const int8x16_t c = vreinterpretq_s8_u8(w_next.v[i]), d = vreinterpretq_s8_u8(x_next.v[i]);
    const int16x8_t low = vmlal_s8(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vget_low_s8(c), vget_low_s8(d));
    const int16x8_t high = vmlal_high_s8(vmull_high_s8(a, b), c, d);
    return vaddq_s32(sum.v[i], vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
  });
}
#endif

inline Ints16 bits(Floats16 x) {
  return each_quarter<Ints16>([&](int i) { return vreinterpretq_s32_f32(x.v[i]); });
}
inline Floats16 floats(Ints16 x) {
  return each_quarter<Floats16>([&](int i) { return vreinterpretq_f32_s32(x.v[i]); });
}
inline Ints16 to_int(Floats16 x) {  // the instruction itself saturates, and makes 0 of a NaN
  return each_quarter<Ints16>([&](int i) {
    const uint32x4_t fits = vcaltq_f32(x.v[i], vdupq_n_f32(2147483648.0f));
    return vbslq_s32(fits, vcvtq_s32_f32(x.v[i]), vdupq_n_s32(INT32_MIN));
  });
}
inline Floats16 to_float(Ints16 x) {
  return each_quarter<Floats16>([&](int i) { return vcvtq_f32_s32(x.v[i]); });
}
// 2^p itself: the sign and the exponent of x.
inline Floats16 powers(Floats16 x) { return floats(bits(x) & ints16(static_cast<int32_t>(0xff800000u))); }
inline Floats16 times_power(Floats16 a, Floats16 power) { return a * power; }

inline int32_t highest(Ints16 x) {
  return vmaxvq_s32(vmaxq_s32(vmaxq_s32(x.v[0], x.v[1]), vmaxq_s32(x.v[2], x.v[3])));
}
inline float highest(Floats16 x) {
  const float32x4_t q = greater_of(greater_of(x.v[0], x.v[2]), greater_of(x.v[1], x.v[3]));
  const float32x4_t d = greater_of(q, vextq_f32(q, q, 2));
  return vgetq_lane_f32(greater_of(d, vextq_f32(d, d, 1)), 0);
}
inline float total(Floats16 x) {
  const float32x4_t q = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
  const float32x2_t d = vadd_f32(vget_low_f32(q), vget_high_f32(q));
  return vget_lane_f32(d, 0) + vget_lane_f32(d, 1);
}
inline Ints16 neighbours_added(Ints16 x) {
  const int32x4_t low = vpaddq_s32(x.v[0], x.v[1]), high = vpaddq_s32(x.v[2], x.v[3]);
  return {{low, high, low, high}};
}
inline Floats16 doubled(Floats16 x) {
  return {{vzip1q_f32(x.v[0], x.v[0]), vzip2q_f32(x.v[0], x.v[0]), vzip1q_f32(x.v[1], x.v[1]), vzip2q_f32(x.v[1], x.v[1])}};
}
inline int32_t sum_16(const int8_t* p) { return vaddlvq_s8(vld1q_s8(p)); }

// Weights: two consecutive inputs for each of 16 channels as floats; x: one row's two in every lane. The first of a pair
// is the low half of 32 bits.
struct Bf16Pairs { Floats16 first, second; };
inline Bf16Pairs split_pairs(Ints16 both) {
  return {floats(shift_left<16>(both)), floats(both & ints16(static_cast<int32_t>(0xffff0000u)))};
}
inline Bf16Pairs bf16_pairs(const uint16_t* p) {
  return split_pairs(each_quarter<Ints16>([&](int i) { return vreinterpretq_s32_u16(vld1q_u16(p + 8 * i)); }));
}
inline Bf16Pairs two_bf16(const uint16_t* p) {
  int32_t both;
  std::memcpy(&both, p, sizeof both);
  return split_pairs(ints16(both));
}
inline Floats16 add_bf16_pairs(Floats16 sum, const Bf16Pairs& w, const Bf16Pairs& x) {
  return fma(x.second, w.second, fma(x.first, w.first, sum));
}

}  // namespace dfk::DFK_ISA
