// Attention with AVX-512: 16 lanes, one register holds a block's 16 keys.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns inside of its own immintrin.h
#endif
#include <immintrin.h>

#include <cstring>

#include "attention.h"

namespace dfk {
namespace {

struct Vec {
  static constexpr int width = 16;
  static constexpr int max_rows = 8;       // query rows of a register tile
  static constexpr int accumulators = 24;  // registers of its sums
  __m512 v;
};

inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Vec load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Vec load_part(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
inline Vec load_part(const uint16_t* p, int64_t n) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Vec load_part(const int8_t* p, int64_t n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p)))};
}
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store_part(float* p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline float highest(Vec a) { return _mm512_reduce_max_ps(a.v); }
// Lane i of a where bit i is set, else of b.
inline Vec select(uint32_t bits, Vec a, Vec b) { return {_mm512_mask_blend_ps(static_cast<__mmask16>(bits), b.v, a.v)}; }

// 2^n p, n whole.
inline Vec scale_by_power(Vec p, Vec n) { return {_mm512_scalef_ps(p.v, n.v)}; }
inline Vec nearest(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// The greater; a NaN stays a NaN.
inline Vec at_least(Vec a, float low) { return {_mm512_max_ps(_mm512_set1_ps(low), a.v)}; }

// Two bfloat16 in each lane.
struct Pairs {
  __m512i v;
};

inline Pairs set1_pair(const char* p) {
  int32_t bits;
  std::memcpy(&bits, p, sizeof(bits));
  return {_mm512_set1_epi32(bits)};
}
// (a[i], b[i]) for i < n <= 16, the other lanes 0.
inline Pairs zip(const uint16_t* a, const uint16_t* b, int64_t n) {
  const __mmask16 lanes = first_lanes(n);
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, a));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, b));
  return {_mm512_or_si512(low, _mm512_slli_epi32(high, 16))};
}
// (p[i], p[16 + i])
inline Pairs zip_halves(const uint16_t* p) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return {_mm512_permutexvar_epi16(_mm512_load_si512(order), _mm512_loadu_si512(p))};
}
// sum + a.first * b.first + a.second * b.second, in float32
inline Vec dot(Vec sum, Pairs a, Pairs b) {
  return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
// Writes x rounded to bfloat16 and returns that.
inline Vec store_rounded(char* p, Vec x) {
  const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16))};
}

}  // namespace
}  // namespace dfk

#define DFK_PAIRS
#include "attention_impl.h"

namespace dfk {
const AttentionOps attention_avx512 = {rope_store_row, scratch_bytes, attend, merge};
}
