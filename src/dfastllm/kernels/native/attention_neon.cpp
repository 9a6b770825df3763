// Attention with NEON: 4 lanes, four registers hold a block's 16 keys. Of 32 registers 24 are sums.
#include <arm_neon.h>

#include <cstring>

#include "attention.h"

namespace dfk {
namespace {

struct Vec {
  static constexpr int width = 4;
  static constexpr int max_rows = 6;
  static constexpr int accumulators = 24;
  float32x4_t v;
};

inline Vec set1(float x) { return {vdupq_n_f32(x)}; }
inline Vec load(const float* p) { return {vld1q_f32(p)}; }
inline Vec load(const uint16_t* p) { return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))}; }
inline Vec load(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)))};
}
template <class T>
inline Vec load_part(const T* p, int64_t n) {
  T full[4] = {};
  std::memcpy(full, p, static_cast<size_t>(n) * sizeof(T));
  return load(full);
}
inline void store(float* p, Vec a) { vst1q_f32(p, a.v); }
inline void store_part(float* p, Vec a, int64_t n) {
  float full[4];
  vst1q_f32(full, a.v);
  std::memcpy(p, full, static_cast<size_t>(n) * sizeof(float));
}
inline Vec add(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
// Of a NaN and a number: b. So not vmaxq, which keeps a NaN on either side.
inline Vec max(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline float highest(Vec a) {
  const Vec x = max(a, {vextq_f32(a.v, a.v, 2)});
  return vgetq_lane_f32(max(x, {vextq_f32(x.v, x.v, 1)}).v, 0);
}
// Lane i of a where bit i is set, else of b.
inline Vec select(uint32_t bits, Vec a, Vec b) {
  constexpr uint32_t each[4] = {1, 2, 4, 8};
  return {vbslq_f32(vtstq_u32(vdupq_n_u32(bits), vld1q_u32(each)), a.v, b.v)};
}

// 2^n p for p in [0.7, 1.5] and whole n; 0 for n < -125. A NaN stays a NaN, whose bits but for the exponent are its own.
inline Vec scale_by_power(Vec p, Vec n) {
  const int32x4_t exponent = vshlq_n_s32(vcvtq_s32_f32(n.v), 23);
  const float32x4_t scaled = vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p.v), exponent));
  return {vbslq_f32(vcltq_f32(n.v, vdupq_n_f32(-125.0f)), vdupq_n_f32(0.0f), scaled)};
}
inline Vec nearest(Vec a) { return {vrndnq_f32(a.v)}; }
// The greater; a NaN stays a NaN.
inline Vec at_least(Vec a, float low) { return {vbslq_f32(vcgtq_f32(vdupq_n_f32(low), a.v), vdupq_n_f32(low), a.v)}; }

}  // namespace
}  // namespace dfk

#include "attention_impl.h"

namespace dfk {
const AttentionOps attention_neon = {rope_store_row, scratch_bytes, attend, merge};
}
