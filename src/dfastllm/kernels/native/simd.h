// Sixteen floats or ints at a time, on whatever registers the translation unit is compiled for: one of 512 bits, two of
// 256, or an array that the compiler vectorises for its baseline. Include it INSIDE the unit's own namespace, after
// <immintrin.h> (x86), <cmath>, <cstdint>, <cstring> and linear_natural.h: what it defines must not be shared between instruction sets.
//
// Every operation is exact or rounds once, so code written on these types gives the same bits on every instruction set,
// but for fma() and what uses it (exp): it rounds once where the hardware has it, else twice.

#if defined(__AVX512F__)

struct Floats16 { __m512 v; };
struct Ints16 { __m512i v; };

inline Floats16 floats16(float x) { return {_mm512_set1_ps(x)}; }
inline Ints16 ints16(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Floats16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
// The first `count` (0 to 16) from memory, the rest zero; nothing beyond them is read.
inline Floats16 load(const float* p, int64_t count) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p)};
}
inline void store(float* p, Floats16 x) { _mm512_storeu_ps(p, x.v); }
inline void store(float* p, Floats16 x, int64_t count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), x.v);
}
inline Floats16 operator+(Floats16 a, Floats16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats16 operator-(Floats16 a, Floats16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats16 operator*(Floats16 a, Floats16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats16 operator/(Floats16 a, Floats16 b) { return {_mm512_div_ps(a.v, b.v)}; }
// Of a NaN and a number: b.
inline Floats16 max(Floats16 a, Floats16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats16 min(Floats16 a, Floats16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Ints16 max(Ints16 a, Ints16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline Ints16 operator+(Ints16 a, Ints16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints16 operator&(Ints16 a, Ints16 b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Ints16 bits(Floats16 a) { return {_mm512_castps_si512(a.v)}; }
inline Floats16 floats(Ints16 a) { return {_mm512_castsi512_ps(a.v)}; }
template <int count> inline Ints16 shift_left(Ints16 a) { return {_mm512_slli_epi32(a.v, count)}; }
template <int count> inline Ints16 shift_right(Ints16 a) { return {_mm512_srli_epi32(a.v, count)}; }  // zeros come in
// a > b ? x : y
inline Ints16 where_greater(Ints16 a, Ints16 b, Ints16 x, Ints16 y) {
  return {_mm512_mask_blend_epi32(_mm512_cmpgt_epi32_mask(a.v, b.v), y.v, x.v)};
}
// Of any lane; a NaN is not greater.
inline bool any_greater(Floats16 a, Floats16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0; }
inline Floats16 fma(Floats16 a, Floats16 b, Floats16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Ints16 to_int(Floats16 a) { return {_mm512_cvttps_epi32(a.v)}; }
inline int32_t highest(Ints16 a) { return _mm512_reduce_max_epi32(a.v); }
inline float highest(Floats16 a) {
  const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}
// bfloat16 and float16 bits as floats.
inline Floats16 load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Floats16 load_half(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// The low byte / half of each to memory.
inline void store8(int8_t* p, Ints16 a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v)); }
inline void store16(uint16_t* p, Ints16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v));
}

#elif defined(__AVX2__)

struct Floats16 { __m256 a, b; };
struct Ints16 { __m256i a, b; };

inline Floats16 floats16(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Ints16 ints16(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Floats16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Floats16 load(const float* p, int64_t count) {
  alignas(32) float all[16] = {};
  std::memcpy(all, p, static_cast<size_t>(count) * sizeof(float));
  return load(all);
}
inline void store(float* p, Floats16 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline void store(float* p, Floats16 x, int64_t count) {
  alignas(32) float all[16];
  store(all, x);
  std::memcpy(p, all, static_cast<size_t>(count) * sizeof(float));
}
inline Floats16 operator+(Floats16 x, Floats16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats16 operator-(Floats16 x, Floats16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Floats16 operator*(Floats16 x, Floats16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats16 operator/(Floats16 x, Floats16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats16 max(Floats16 x, Floats16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Floats16 min(Floats16 x, Floats16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Ints16 max(Ints16 x, Ints16 y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
inline Ints16 operator+(Ints16 x, Ints16 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline Ints16 operator&(Ints16 x, Ints16 y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline Ints16 bits(Floats16 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline Floats16 floats(Ints16 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
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
inline bool any_greater(Floats16 x, Floats16 y) {
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ))) != 0;
}
inline Floats16 fma(Floats16 x, Floats16 y, Floats16 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline Ints16 to_int(Floats16 x) { return {_mm256_cvttps_epi32(x.a), _mm256_cvttps_epi32(x.b)}; }
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
inline __m256 bf16_8(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Floats16 load_bf16(const uint16_t* p) { return {bf16_8(p), bf16_8(p + 8)}; }
inline Floats16 load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline __m256i halves(Ints16 x) {  // 16 ints in [-32768, 32767], in order
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
}
inline void store8(int8_t* p, Ints16 x) {
  const __m256i h = halves(x);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packs_epi16(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1)));
}
inline void store16(uint16_t* p, Ints16 x) {  // packus: the ints are 0 to 65535
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8));
}

#else

struct Floats16 { float v[16]; };
struct Ints16 { int32_t v[16]; };

template <class To, class F> inline To each(F f) {
  To out;
  for (int i = 0; i < 16; ++i) out.v[i] = f(i);
  return out;
}
inline Floats16 floats16(float x) { return each<Floats16>([&](int) { return x; }); }
inline Ints16 ints16(int32_t x) { return each<Ints16>([&](int) { return x; }); }
inline Floats16 load(const float* p) { return each<Floats16>([&](int i) { return p[i]; }); }
inline Floats16 load(const float* p, int64_t count) {
  Floats16 out = floats16(0);
  for (int64_t i = 0; i < count; ++i) out.v[i] = p[i];
  return out;
}
inline void store(float* p, Floats16 x) { for (int i = 0; i < 16; ++i) p[i] = x.v[i]; }
inline void store(float* p, Floats16 x, int64_t count) { for (int64_t i = 0; i < count; ++i) p[i] = x.v[i]; }
inline Floats16 operator+(Floats16 a, Floats16 b) { return each<Floats16>([&](int i) { return a.v[i] + b.v[i]; }); }
inline Floats16 operator-(Floats16 a, Floats16 b) { return each<Floats16>([&](int i) { return a.v[i] - b.v[i]; }); }
inline Floats16 operator*(Floats16 a, Floats16 b) { return each<Floats16>([&](int i) { return a.v[i] * b.v[i]; }); }
inline Floats16 operator/(Floats16 a, Floats16 b) { return each<Floats16>([&](int i) { return a.v[i] / b.v[i]; }); }
inline Floats16 max(Floats16 a, Floats16 b) { return each<Floats16>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline Floats16 min(Floats16 a, Floats16 b) { return each<Floats16>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline Ints16 max(Ints16 a, Ints16 b) { return each<Ints16>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline Ints16 operator+(Ints16 a, Ints16 b) {
  return each<Ints16>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i])); });
}
inline Ints16 operator&(Ints16 a, Ints16 b) { return each<Ints16>([&](int i) { return a.v[i] & b.v[i]; }); }
inline Ints16 bits(Floats16 a) {
  Ints16 out;
  std::memcpy(&out, &a, sizeof out);
  return out;
}
inline Floats16 floats(Ints16 a) {
  Floats16 out;
  std::memcpy(&out, &a, sizeof out);
  return out;
}
template <int count> inline Ints16 shift_left(Ints16 a) {
  return each<Ints16>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << count); });
}
template <int count> inline Ints16 shift_right(Ints16 a) {
  return each<Ints16>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> count); });
}
inline Ints16 where_greater(Ints16 a, Ints16 b, Ints16 x, Ints16 y) {
  return each<Ints16>([&](int i) { return a.v[i] > b.v[i] ? x.v[i] : y.v[i]; });
}
inline bool any_greater(Floats16 a, Floats16 b) {
  int found = 0;
  for (int i = 0; i < 16; ++i) found |= a.v[i] > b.v[i];
  return found != 0;
}
inline Floats16 fma(Floats16 a, Floats16 b, Floats16 c) { return each<Floats16>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
inline Ints16 to_int(Floats16 a) {  // out of range as on x86, where C++ leaves it undefined
  return each<Ints16>([&](int i) {
    return a.v[i] > -2147483648.0f && a.v[i] < 2147483648.0f ? static_cast<int32_t>(a.v[i]) : INT32_MIN;
  });
}
template <class V> inline auto highest(V x) {
  auto best = x.v[0];
  for (int i = 1; i < 16; ++i) best = best > x.v[i] ? best : x.v[i];
  return best;
}
inline Floats16 load_bf16(const uint16_t* p) {
  return floats(each<Ints16>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(p[i]) << 16); }));
}
inline Floats16 load_half(const uint16_t* p) { return each<Floats16>([&](int i) { return half_to_float(p[i]); }); }
inline void store8(int8_t* p, Ints16 a) { for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]); }
inline void store16(uint16_t* p, Ints16 a) { for (int i = 0; i < 16; ++i) p[i] = static_cast<uint16_t>(a.v[i]); }

#endif

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

// Lane sums in one fixed order: halves, quarters, ...
#if defined(__AVX512F__) || defined(__AVX2__)
inline float total(__m256 x) {
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
#endif
#if defined(__AVX512F__)
inline float total(Floats16 x) {
  return total(_mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1)));
}
#elif defined(__AVX2__)
inline float total(Floats16 x) { return total(_mm256_add_ps(x.a, x.b)); }
#else
inline float total(Floats16 x) {
  float v[16];
  store(v, x);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  }
  return v[0];
}
#endif

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
