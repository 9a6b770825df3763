// The vocabulary of simd.h on AVX2 with FMA and F16C, with the dot product of AVX-VNNI (or of AVX-512 VNNI on 256 bits)
// or without: two registers of 256 bits.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "isa_here.h"

namespace dfk::DFK_ISA {

struct Floats16 { __m256 a, b; };
struct Ints16 { __m256i a, b; };
struct Codes16 { __m256i a, b; };

inline __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_256(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

inline Floats16 floats16(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Ints16 ints16(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Codes16 codes16(int8_t x) { return {_mm256_set1_epi8(x), _mm256_set1_epi8(x)}; }
inline Codes16 four_codes(const void* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  const __m256i all = _mm256_set1_epi32(four);
  return {all, all};
}
inline Floats16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
// Lanes [0, count) of eight; the others, masked out, are neither read nor written.
inline __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Floats16 load(const float* p, int64_t count) {
  return {_mm256_maskload_ps(p, first_lanes(count)), _mm256_maskload_ps(p + 8, first_lanes(count - 8))};
}
inline void store(float* p, Floats16 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline void store(float* p, Floats16 x, int64_t count) {
  _mm256_maskstore_ps(p, first_lanes(count), x.a);
  _mm256_maskstore_ps(p + 8, first_lanes(count - 8), x.b);
}
inline Ints16 load_ints(const int32_t* p) { return {load_256(p), load_256(p + 8)}; }
inline Ints16 load_ints(const int32_t* p, int64_t count) {
  return {_mm256_maskload_epi32(p, first_lanes(count)), _mm256_maskload_epi32(p + 8, first_lanes(count - 8))};
}
inline void store(int32_t* p, Ints16 x) {
  store_256(p, x.a);
  store_256(p + 8, x.b);
}
inline Codes16 load_codes(const void* p) {
  return {load_256(p), load_256(static_cast<const uint8_t*>(p) + 32)};
}
inline void store(uint8_t* p, Codes16 x) {
  store_256(p, x.a);
  store_256(p + 32, x.b);
}
inline __m256 bf16_8(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Floats16 load_bf16(const uint16_t* p) { return {bf16_8(p), bf16_8(p + 8)}; }
inline __m256 half_8(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Floats16 load_half(const uint16_t* p) { return {half_8(p), half_8(p + 8)}; }
inline __m256 int8_8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Floats16 load_int8(const int8_t* p) { return {int8_8(p), int8_8(p + 8)}; }
inline void store8(int8_t* p, Ints16 x) {  // packs: saturates, then the low bytes of 8-bit numbers are themselves
  const __m256i h = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1)));
}
inline void store16(uint16_t* p, Ints16 x) {  // packus: the ints are 0 to 65535
  store_256(p, _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8));
}

inline Floats16 operator+(Floats16 x, Floats16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats16 operator-(Floats16 x, Floats16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Floats16 operator*(Floats16 x, Floats16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats16 operator/(Floats16 x, Floats16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats16 max(Floats16 x, Floats16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Floats16 min(Floats16 x, Floats16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Floats16 fma(Floats16 x, Floats16 y, Floats16 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Floats16 multiply_add(Floats16 x, Floats16 y, Floats16 z) { return fma(x, y, z); }
inline bool any_greater(Floats16 x, Floats16 y) {
  const __m256 a = _mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ), b = _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ);
  return _mm256_movemask_ps(_mm256_or_ps(a, b)) != 0;
}

inline Ints16 operator+(Ints16 x, Ints16 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline Ints16 operator-(Ints16 x, Ints16 y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline Ints16 operator&(Ints16 x, Ints16 y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline Ints16 max(Ints16 x, Ints16 y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
template <int count> inline Ints16 shift_left(Ints16 x) {
  return {_mm256_slli_epi32(x.a, count), _mm256_slli_epi32(x.b, count)};
}
template <int count> inline Ints16 shift_right(Ints16 x) {
  return {_mm256_srli_epi32(x.a, count), _mm256_srli_epi32(x.b, count)};
}
inline Ints16 where_greater(Ints16 a, Ints16 b, Ints16 x, Ints16 y) {
  return {_mm256_blendv_epi8(y.a, x.a, _mm256_cmpgt_epi32(a.a, b.a)),
          _mm256_blendv_epi8(y.b, x.b, _mm256_cmpgt_epi32(a.b, b.b))};
}

inline __m256 select_8(uint32_t mask, __m256 x, __m256 y) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int32_t>(mask)), lane), lane);
  return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(set));
}
inline Floats16 select(uint32_t mask, Floats16 x, Floats16 y) {
  return {select_8(mask, x.a, y.a), select_8(mask >> 8, x.b, y.b)};
}

inline Codes16 operator&(Codes16 x, Codes16 y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline Codes16 operator|(Codes16 x, Codes16 y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
template <int count> inline Codes16 shift_left(Codes16 x) {
  return {_mm256_slli_epi16(x.a, count), _mm256_slli_epi16(x.b, count)};
}
template <int count> inline Codes16 shift_right(Codes16 x) {
  return {_mm256_srli_epi16(x.a, count), _mm256_srli_epi16(x.b, count)};
}
inline Codes16 masked_or(Codes16 a, Codes16 mask, Codes16 b) { return (a & mask) | b; }
inline Codes16 operator-(Codes16 x, Codes16 y) { return {_mm256_sub_epi8(x.a, y.a), _mm256_sub_epi8(x.b, y.b)}; }
inline Codes16 operator+(Codes16 x, Codes16 y) { return {_mm256_add_epi8(x.a, y.a), _mm256_add_epi8(x.b, y.b)}; }
inline __m256i four_of_eight(const uint8_t* p) {
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i first = _mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c);
  return _mm256_shuffle_epi8(wide, _mm256_broadcastsi128_si256(first));
}
inline Codes16 four_of_each(const uint8_t* p) { return {four_of_eight(p), four_of_eight(p + 8)}; }
// In 16-bit lanes: no carry leaves the low byte.
inline Codes16 scaled(Codes16 codes, Codes16 factors) {
  const __m256i low = _mm256_set1_epi16(255);
  return {_mm256_mullo_epi16(codes.a, _mm256_and_si256(factors.a, low)),
          _mm256_mullo_epi16(codes.b, _mm256_and_si256(factors.b, low))};
}

#if defined(DFK_SIMD_DOT)
// The sum stays in a register: GCC would unpack the weights of several steps before it multiplies, and spill.
inline __m256i dot_256(__m256i sum, __m256i w, __m256i x) {
#if defined(__AVXVNNI__)
  sum = _mm256_dpbusd_avx_epi32(sum, w, x);
#else
  sum = _mm256_dpbusd_epi32(sum, w, x);
#endif
  asm volatile("" : "+x"(sum));
  return sum;
}
inline Ints16 dot(Ints16 sum, Codes16 w, Codes16 x) { return {dot_256(sum.a, w.a, x.a), dot_256(sum.b, w.b, x.b)}; }
#else
// Two 16-bit numbers a lane: sums of the products of inputs 0 and 1, and of 2 and 3.
struct Pairs16 { __m256i a, b; };
inline Pairs16 pairs16(int16_t x) { return {_mm256_set1_epi16(x), _mm256_set1_epi16(x)}; }
inline Pairs16 operator+(Pairs16 x, Pairs16 y) { return {_mm256_add_epi16(x.a, y.a), _mm256_add_epi16(x.b, y.b)}; }
// Two products, w unsigned, x signed bytes, added up; their sum must fit 16 bits (the instruction saturates).
inline Pairs16 pair_products(Codes16 w, Codes16 x) { return {_mm256_maddubs_epi16(w.a, x.a), _mm256_maddubs_epi16(w.b, x.b)}; }
inline Pairs16 operator-(Pairs16 x, Pairs16 y) { return {_mm256_sub_epi16(x.a, y.a), _mm256_sub_epi16(x.b, y.b)}; }
inline Pairs16 operator*(Pairs16 x, Pairs16 y) { return {_mm256_mullo_epi16(x.a, y.a), _mm256_mullo_epi16(x.b, y.b)}; }
// The nibbles of every even byte as 16-bit numbers.
inline Pairs16 low_nibbles(Codes16 x) {
  const __m256i nibble = _mm256_set1_epi16(15);
  return {_mm256_and_si256(x.a, nibble), _mm256_and_si256(x.b, nibble)};
}
inline Pairs16 high_nibbles(Codes16 x) { return low_nibbles(shift_right<4>(x)); }
// sum + pair_products(w, x), the sum kept in registers: GCC would multiply for all sums of a tile before it adds to any of
// them, and spill.
inline Pairs16 add_products(Pairs16 sum, Codes16 w, Codes16 x) {
  sum.a = _mm256_add_epi16(sum.a, _mm256_maddubs_epi16(w.a, x.a));
  asm volatile("" : "+x"(sum.a));
  sum.b = _mm256_add_epi16(sum.b, _mm256_maddubs_epi16(w.b, x.b));
  asm volatile("" : "+x"(sum.b));
  return sum;
}
// first * factors.first + second * factors.second
inline Ints16 widened(Pairs16 x, Pairs16 factors) {
  return {_mm256_madd_epi16(x.a, factors.a), _mm256_madd_epi16(x.b, factors.b)};
}
// One row's two 16-bit numbers in every lane.
inline Pairs16 two_shorts(int32_t both) { return {_mm256_set1_epi32(both), _mm256_set1_epi32(both)}; }
// 32 codes x -> low in [-8, 7] and high in [-8, 8], x = low + 16 * high.
inline void split_codes(const int8_t* x, int8_t* low, int8_t* high) {
  const __m256i all = load_256(x), eight = _mm256_set1_epi8(8), nibble = _mm256_set1_epi8(15);
  const __m256i l = _mm256_sub_epi8(_mm256_xor_si256(_mm256_and_si256(all, nibble), eight), eight);
  const __m256i up = _mm256_srli_epi16(_mm256_xor_si256(all, _mm256_set1_epi8(-128)), 4);
  const __m256i h = _mm256_sub_epi8(_mm256_and_si256(up, nibble), eight);
  store_256(low, l);
  store_256(high, _mm256_sub_epi8(h, _mm256_cmpgt_epi8(_mm256_setzero_si256(), l)));
}
// Of 32 codes, in every 128 bits all four lanes alike: the sums of its inputs 4 i and 4 i + 1, and of 4 i + 2 and 4 i + 3,
// as two 16-bit numbers.
inline __m256i pair_sums(const int8_t* x) {
  const __m256i sums = _mm256_maddubs_epi16(_mm256_set1_epi8(1), load_256(x));
  const __m256i twos = _mm256_add_epi16(sums, _mm256_shuffle_epi32(sums, 0x4e));
  return _mm256_add_epi16(twos, _mm256_shuffle_epi32(twos, 0xb1));
}
// Those of all 32.
inline __m128i all_pair_sums(const int8_t* x) {
  const __m256i sums = pair_sums(x);
  return _mm_add_epi16(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
}
inline int32_t group_sums(const int8_t* x) { return _mm_cvtsi128_si32(all_pair_sums(x)); }
// -8 times them.
inline int32_t group_starts(const int8_t* x) {
  return _mm_cvtsi128_si32(_mm_sub_epi16(_mm_setzero_si128(), _mm_slli_epi16(all_pair_sums(x), 3)));
}
// -32 times those of each half.
inline void half_starts(const int8_t* x, int32_t* out) {
  const __m256i starts = _mm256_sub_epi16(_mm256_setzero_si256(), _mm256_slli_epi16(pair_sums(x), 5));
  out[0] = _mm256_cvtsi256_si32(starts);
  out[1] = _mm_cvtsi128_si32(_mm256_extracti128_si256(starts, 1));
}
#endif

inline Ints16 bits(Floats16 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline Floats16 floats(Ints16 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
inline Ints16 to_int(Floats16 x) { return {_mm256_cvttps_epi32(x.a), _mm256_cvttps_epi32(x.b)}; }
inline Floats16 to_float(Ints16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
// 2^p itself: the sign and the exponent of x.
inline Floats16 powers(Floats16 x) { return floats(bits(x) & ints16(static_cast<int32_t>(0xff800000u))); }
inline Floats16 times_power(Floats16 a, Floats16 power) { return a * power; }

inline __m256 times_two_to_8(__m256 x, __m256 n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  const __m256 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), exponent));
  return _mm256_blendv_ps(scaled, _mm256_setzero_ps(), _mm256_cmp_ps(n, _mm256_set1_ps(-125.0f), _CMP_LT_OQ));
}
inline Floats16 times_two_to(Floats16 x, Floats16 n) { return {times_two_to_8(x.a, n.a), times_two_to_8(x.b, n.b)}; }

inline int32_t highest(Ints16 x) {
  const __m256i h = _mm256_max_epi32(x.a, x.b);
  __m128i q = _mm_max_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
  q = _mm_max_epi32(q, _mm_shuffle_epi32(q, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
}
inline float highest(Floats16 x) {
  const __m256 h = _mm256_max_ps(x.a, x.b);
  const __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}
inline float total(Floats16 x) {
  const __m256 h = _mm256_add_ps(x.a, x.b);
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
inline Ints16 neighbours_added(Ints16 x) {
  const __m256i added = _mm256_permute4x64_epi64(_mm256_hadd_epi32(x.a, x.b), 0xd8);
  return {added, added};
}
inline Floats16 doubled(Floats16 x) {
  return {_mm256_permutevar8x32_ps(x.a, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3)),
          _mm256_permutevar8x32_ps(x.a, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7))};
}
template <int n> inline Floats16 crossed(Floats16 x) {
  if constexpr (n == 1) return {_mm256_permute_ps(x.a, 0xb1), _mm256_permute_ps(x.b, 0xb1)};
  else if constexpr (n == 2) return {_mm256_permute_ps(x.a, 0x4e), _mm256_permute_ps(x.b, 0x4e)};
  else if constexpr (n == 4) return {_mm256_permute2f128_ps(x.a, x.a, 1), _mm256_permute2f128_ps(x.b, x.b, 1)};
  else return {x.b, x.a};
}
inline int32_t sum_16(const int8_t* p) {
  const __m128i shifted = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), _mm_set1_epi8(-128));
  const __m128i sums = _mm_sad_epu8(shifted, _mm_setzero_si128());
  return _mm_cvtsi128_si32(sums) + _mm_extract_epi16(sums, 4) - 16 * 128;
}

// Weights: two consecutive inputs for each of 16 channels as floats; x: one row's two in every lane. The first of a pair
// is the low half of 32 bits.
struct Bf16Pairs { Floats16 first, second; };
inline Bf16Pairs split_pairs(Ints16 both) {
  return {floats(shift_left<16>(both)), floats(both & ints16(static_cast<int32_t>(0xffff0000u)))};
}
inline Bf16Pairs bf16_pairs(const uint16_t* p) { return split_pairs({load_256(p), load_256(p + 16)}); }
inline Bf16Pairs two_bf16(const uint16_t* p) {
  int32_t both;
  std::memcpy(&both, p, sizeof both);
  return split_pairs(ints16(both));
}
inline Floats16 add_bf16_pairs(Floats16 sum, const Bf16Pairs& w, const Bf16Pairs& x) {
  return fma(x.second, w.second, fma(x.first, w.first, sum));
}

}  // namespace dfk::DFK_ISA
