// The vocabulary of simd.h on AVX-512 with VNNI and BF16: one register of 512 bits.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "isa_here.h"


namespace dfk::DFK_ISA {

struct Floats16 { __m512 v; };
struct Ints16 { __m512i v; };
struct Codes16 { __m512i v; };

inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

inline Floats16 floats16(float x) { return {_mm512_set1_ps(x)}; }
inline Ints16 ints16(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Codes16 codes16(int8_t x) { return {_mm512_set1_epi8(x)}; }
inline Codes16 four_codes(const void* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return {_mm512_set1_epi32(four)};
}
inline Floats16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Floats16 load(const float* p, int64_t count) { return {_mm512_maskz_loadu_ps(first_lanes(count), p)}; }
inline void store(float* p, Floats16 x) { _mm512_storeu_ps(p, x.v); }
inline void store(float* p, Floats16 x, int64_t count) { _mm512_mask_storeu_ps(p, first_lanes(count), x.v); }
inline Ints16 load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline Ints16 load_ints(const int32_t* p, int64_t count) { return {_mm512_maskz_loadu_epi32(first_lanes(count), p)}; }
inline void store(int32_t* p, Ints16 x) { _mm512_storeu_si512(p, x.v); }
inline Codes16 load_codes(const void* p) { return {_mm512_loadu_si512(p)}; }
inline void store(uint8_t* p, Codes16 x) { _mm512_storeu_si512(p, x.v); }
inline Floats16 load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Floats16 load_half(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Floats16 load_int8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline void store8(int8_t* p, Ints16 a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v)); }
inline void store16(uint16_t* p, Ints16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v));
}

inline Floats16 operator+(Floats16 a, Floats16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats16 operator-(Floats16 a, Floats16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats16 operator*(Floats16 a, Floats16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats16 operator/(Floats16 a, Floats16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats16 max(Floats16 a, Floats16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats16 min(Floats16 a, Floats16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats16 fma(Floats16 a, Floats16 b, Floats16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats16 multiply_add(Floats16 a, Floats16 b, Floats16 c) { return fma(a, b, c); }
inline bool any_greater(Floats16 a, Floats16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0; }

inline Ints16 operator+(Ints16 a, Ints16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints16 operator-(Ints16 a, Ints16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline Ints16 operator&(Ints16 a, Ints16 b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Ints16 max(Ints16 a, Ints16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
template <int count> inline Ints16 shift_left(Ints16 a) { return {_mm512_slli_epi32(a.v, count)}; }
template <int count> inline Ints16 shift_right(Ints16 a) { return {_mm512_srli_epi32(a.v, count)}; }
inline Ints16 where_greater(Ints16 a, Ints16 b, Ints16 x, Ints16 y) {
  return {_mm512_mask_blend_epi32(_mm512_cmpgt_epi32_mask(a.v, b.v), y.v, x.v)};
}

inline Floats16 select(uint32_t mask, Floats16 a, Floats16 b) {
  return {_mm512_mask_blend_ps(static_cast<__mmask16>(mask), b.v, a.v)};
}

inline Codes16 operator&(Codes16 a, Codes16 b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Codes16 operator|(Codes16 a, Codes16 b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int count> inline Codes16 shift_left(Codes16 a) { return {_mm512_slli_epi16(a.v, count)}; }
template <int count> inline Codes16 shift_right(Codes16 a) { return {_mm512_srli_epi16(a.v, count)}; }
inline Codes16 masked_or(Codes16 a, Codes16 mask, Codes16 b) {
  return {_mm512_ternarylogic_epi64(a.v, mask.v, b.v, 0xEA)};
}
inline Codes16 operator-(Codes16 a, Codes16 b) { return {_mm512_sub_epi8(a.v, b.v)}; }
inline Codes16 operator+(Codes16 a, Codes16 b) { return {_mm512_add_epi8(a.v, b.v)}; }
inline Codes16 four_of_each(const uint8_t* p) {
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm512_shuffle_epi8(wide, _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0))};
}
// In 16-bit lanes: no carry leaves the low byte.
inline Codes16 scaled(Codes16 codes, Codes16 factors) {
  return {_mm512_mullo_epi16(codes.v, _mm512_and_si512(factors.v, _mm512_set1_epi16(255)))};
}
inline Ints16 dot(Ints16 sum, Codes16 w, Codes16 x) { return {_mm512_dpbusd_epi32(sum.v, w.v, x.v)}; }

inline Ints16 bits(Floats16 a) { return {_mm512_castps_si512(a.v)}; }
inline Floats16 floats(Ints16 a) { return {_mm512_castsi512_ps(a.v)}; }
inline Ints16 to_int(Floats16 a) { return {_mm512_cvttps_epi32(a.v)}; }
inline Floats16 to_float(Ints16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
// The exponent: vscalefps multiplies outside of the ports of the dot products. Of 0: -inf.
inline Floats16 powers(Floats16 x) { return {_mm512_getexp_ps(x.v)}; }
inline Floats16 times_power(Floats16 a, Floats16 power) { return {_mm512_scalef_ps(a.v, power.v)}; }

inline Floats16 times_two_to(Floats16 a, Floats16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }

inline int32_t highest(Ints16 a) { return _mm512_reduce_max_epi32(a.v); }
inline float highest(Floats16 a) {
  const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}
inline float total(Floats16 x) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
inline Ints16 neighbours_added(Ints16 a) {
  const __m512i even = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 14, 12, 10, 8, 6, 4, 2, 0);
  return {_mm512_permutexvar_epi32(even, _mm512_add_epi32(a.v, _mm512_srli_epi64(a.v, 32)))};
}
inline Floats16 doubled(Floats16 a) {
  return {_mm512_permutexvar_ps(_mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0), a.v)};
}
template <int n> inline Floats16 crossed(Floats16 a) {
  if constexpr (n == 1) return {_mm512_permute_ps(a.v, 0xb1)};
  else if constexpr (n == 2) return {_mm512_permute_ps(a.v, 0x4e)};
  else if constexpr (n == 4) return {_mm512_shuffle_f32x4(a.v, a.v, 0xb1)};
  else return {_mm512_shuffle_f32x4(a.v, a.v, 0x4e)};
}
inline int32_t sum_16(const int8_t* p) {
  const __m128i shifted = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), _mm_set1_epi8(-128));
  const __m128i sums = _mm_sad_epu8(shifted, _mm_setzero_si128());
  return _mm_cvtsi128_si32(sums) + _mm_extract_epi16(sums, 4) - 16 * 128;
}

// Weights: bfloat16 bits of two consecutive inputs for each of 16 channels; x: one row's two in every lane. vdpbf16ps
// rounds each way of its own, and takes denormal inputs and sums as zero.
using Bf16Pairs = Codes16;
inline Bf16Pairs bf16_pairs(const uint16_t* p) { return load_codes(p); }
inline Bf16Pairs two_bf16(const uint16_t* p) { return four_codes(p); }
inline Floats16 add_bf16_pairs(Floats16 sum, Bf16Pairs w, Bf16Pairs x) {
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)w.v, (__m512bh)x.v)};
}
inline __m512i wide_16(const uint16_t* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Bf16Pairs zip(const uint16_t* first, const uint16_t* second) {
  return {_mm512_or_si512(wide_16(first), _mm512_slli_epi32(wide_16(second), 16))};
}
inline Bf16Pairs zip_halves(const uint16_t* p) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return {_mm512_permutexvar_epi16(_mm512_load_si512(order), _mm512_loadu_si512(p))};
}
inline Bf16Pairs exact_pairs(Floats16 first, Floats16 second) {
  return {_mm512_or_si512(_mm512_srli_epi32(bits(first).v, 16), bits(second).v)};
}
inline Floats16 store_bf16(uint16_t* p, Floats16 x) {
  const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(x.v);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16))};
}

}  // namespace dfk::DFK_ISA
