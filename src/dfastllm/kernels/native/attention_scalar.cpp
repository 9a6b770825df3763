// Attention in the baseline instructions of any platform: 4 lanes, which compilers map to SSE2 or NEON. A multiply and
// an add instead of a fused one, which would be a library call where the CPU has none.
#include <cstring>

#include "attention.h"

namespace dfk {
namespace {

using Float4 = float __attribute__((vector_size(16)));
using Int4 = int32_t __attribute__((vector_size(16)));
using Unsigned4 = uint32_t __attribute__((vector_size(16)));

struct Vec {
  static constexpr int width = 4;
  static constexpr int max_rows = 2;
  static constexpr int accumulators = 8;
  Float4 v;
};

inline Vec set1(float x) { return {Float4{x, x, x, x}}; }
inline Vec load(const float* p) {
  Vec out;
  std::memcpy(&out.v, p, sizeof(out.v));
  return out;
}
inline Vec load(const uint16_t* p) {
  const Unsigned4 bits = {p[0], p[1], p[2], p[3]}, wide = bits << 16;
  Vec out;
  std::memcpy(&out.v, &wide, sizeof(out.v));
  return out;
}
inline Vec load(const int8_t* p) {
  return {Float4{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])}};
}
template <class T>
inline Vec load_part(const T* p, int64_t n) {
  T full[4] = {};
  std::memcpy(full, p, static_cast<size_t>(n) * sizeof(T));
  return load(full);
}
inline void store(float* p, Vec a) { std::memcpy(p, &a.v, sizeof(a.v)); }
inline void store_part(float* p, Vec a, int64_t n) { std::memcpy(p, &a.v, static_cast<size_t>(n) * sizeof(float)); }
inline Vec add(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec sub(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec div(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline float highest(Vec a) {
  const float x = a.v[0] > a.v[1] ? a.v[0] : a.v[1], y = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
  return x > y ? x : y;
}
// Lane i of a where bit i is set, else of b.
inline Vec select(uint32_t bits, Vec a, Vec b) {
  const Int4 lane = {1, 2, 4, 8};
  const int32_t x = static_cast<int32_t>(bits);
  const Int4 set = (Int4{x, x, x, x} & lane) == lane;
  return {set ? a.v : b.v};
}

// The whole number nearest to a, |a| below 2^22: beyond 1.5 * 2^23 floats have no fraction.
inline Vec nearest(Vec a) {
  const Vec shift = set1(12582912.0f);
  return {(a.v + shift.v) - shift.v};
}
// 2^n p for p in [0.7, 1.5] and whole n; 0 for n < -125. A NaN stays a NaN.
inline Vec scale_by_power(Vec p, Vec n) {
  const Float4 shifted = n.v + set1(12582912.0f).v;  // its low bits are n
  Unsigned4 exponent, bits;
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  std::memcpy(&bits, &p.v, sizeof(bits));
  bits += exponent << 23;
  Vec out;
  std::memcpy(&out.v, &bits, sizeof(bits));
  return {p.v != p.v ? p.v : n.v < set1(-125.0f).v ? set1(0.0f).v : out.v};
}
// The greater; a NaN stays a NaN.
inline Vec at_least(Vec a, float low) { return {set1(low).v > a.v ? set1(low).v : a.v}; }

}  // namespace
}  // namespace dfk

#include "attention_impl.h"

namespace dfk {
const AttentionOps attention_scalar = {rope_store_row, scratch_bytes, attend, merge};
}
