// Attention with AVX2 and FMA: 8 lanes, two registers hold a block's 16 keys.
#include <immintrin.h>

#include <cstring>

#include "attention.h"

namespace dfk {
namespace {

struct Vec {
  static constexpr int width = 8;
  static constexpr int max_rows = 6;
  static constexpr int accumulators = 12;
  __m256 v;
};

inline Vec set1(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline Vec load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
template <class T>
inline Vec load_part(const T* p, int64_t n) {
  T full[8] = {};
  std::memcpy(full, p, static_cast<size_t>(n) * sizeof(T));
  return load(full);
}
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store_part(float* p, Vec a, int64_t n) {
  float full[8];
  _mm256_storeu_ps(full, a.v);
  std::memcpy(p, full, static_cast<size_t>(n) * sizeof(float));
}
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline float highest(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
// Lane i of a where bit i is set, else of b.
inline Vec select(uint32_t bits, Vec a, Vec b) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
  return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(set))};
}

// 2^n p for p in [0.7, 1.5] and whole n; 0 for n < -125. A NaN stays a NaN.
inline Vec scale_by_power(Vec p, Vec n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n.v), 23);
  const __m256 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.v), exponent));
  return {_mm256_blendv_ps(scaled, _mm256_setzero_ps(), _mm256_cmp_ps(n.v, _mm256_set1_ps(-125.0f), _CMP_LT_OQ))};
}
inline Vec nearest(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// The greater; a NaN stays a NaN.
inline Vec at_least(Vec a, float low) { return {_mm256_max_ps(_mm256_set1_ps(low), a.v)}; }

}  // namespace
}  // namespace dfk

#include "attention_impl.h"

namespace dfk {
const AttentionOps attention_avx2 = {rope_store_row, scratch_bytes, attend, merge};
}
