// Both halves of a low-rank product, a few rows at a time. However many rows and ranks go together, each sum runs in one
// fixed order.
#pragma once

#include <cstdint>
#include <cstring>

#include "linear.h"
#include "low_rank.h"
#include "simd.h"
#include "unroll.h"

namespace dfk::DFK_ISA::low_rank {

struct F32 {
  using T = float;
  static Floats16 at(const float* p) { return load(p); }
  static Floats16 at(const float* p, int64_t count) { return load(p, count); }
};

template <Floats16 (*widen_16)(const uint16_t*)> struct Narrow {
  using T = uint16_t;
  static Floats16 at(const uint16_t* p) { return widen_16(p); }
  static Floats16 at(const uint16_t* p, int64_t count) {
    uint16_t all[16] = {};
    std::memcpy(all, p, static_cast<size_t>(count) * sizeof(uint16_t));
    return widen_16(all);
  }
};
using Bf16 = Narrow<load_bf16>;
using F16 = Narrow<load_half>;

// So many sums of 16 lanes at once: as many as stay in registers.
#if defined(DFK_SIMD_AVX512)
constexpr int kRanks = 4, kRows = 4;
#else
constexpr int kRanks = 2, kRows = 2;
#endif

template <class E, int ranks, int rows>
inline void dot_block(const typename E::T* a, int64_t k, const float* x, int64_t ldx, float scale, float* out, int64_t ldo) {
  Floats16 sums[ranks][rows];
  DFK_EACH(j, ranks) { DFK_EACH(r, rows) { sums[j][r] = floats16(0.0f); } }
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) {
    Floats16 left[ranks];
    DFK_EACH(j, ranks) { left[j] = E::at(a + j * k + i); }
    DFK_EACH(r, rows) {
      const Floats16 right = load(x + r * ldx + i);
      DFK_EACH(j, ranks) { sums[j][r] = fma(left[j], right, sums[j][r]); }
    }
  }
  if (i < k) {
    DFK_EACH(j, ranks) {
      const Floats16 left = E::at(a + j * k + i, k - i);
      DFK_EACH(r, rows) { sums[j][r] = fma(left, load(x + r * ldx + i, k - i), sums[j][r]); }
    }
  }
  DFK_EACH(r, rows) { DFK_EACH(j, ranks) { out[r * ldo + j] = scale * total(sums[j][r]); } }
}

template <class E, int ranks>
inline void dot_ranks(const typename E::T* a, int64_t k, const float* x, int64_t ldx, int64_t rows, float scale, float* out,
                      int64_t ldo) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) dot_block<E, ranks, kRows>(a, k, x + r * ldx, ldx, scale, out + r * ldo, ldo);
  for (; r < rows; ++r) dot_block<E, ranks, 1>(a, k, x + r * ldx, ldx, scale, out + r * ldo, ldo);
}

template <class E>
void dots_of(const void* a, int64_t k, int64_t count, const float* x, int64_t ldx, int64_t rows, float scale, float* out,
             int64_t ldo) {
  const auto* from = static_cast<const typename E::T*>(a);
  int64_t j = 0;
  for (; j + kRanks <= count; j += kRanks) dot_ranks<E, kRanks>(from + j * k, k, x, ldx, rows, scale, out + j, ldo);
  for (; j < count; ++j) dot_ranks<E, 1>(from + j * k, k, x, ldx, rows, scale, out + j, ldo);
}

inline void dots(Element type, const void* a, int64_t k, int64_t count, const float* x, int64_t ldx, int64_t rows,
                 float scale, float* out, int64_t ldo) {
  if (type == Element::f32) dots_of<F32>(a, k, count, x, ldx, rows, scale, out, ldo);
  else if (type == Element::bf16) dots_of<Bf16>(a, k, count, x, ldx, rows, scale, out, ldo);
  else dots_of<F16>(a, k, count, x, ldx, rows, scale, out, ldo);
}

template <class E> void widen_of(const void* from, int64_t count, int64_t stride, float* out) {
  const auto* p = static_cast<const typename E::T*>(from);
  for (int64_t i = 0; i < count; i += stride == 1 ? 16 : 1) {
    const int64_t here = stride != 1 ? 1 : count - i < 16 ? count - i : 16;
    store(out + i, E::at(p + i * stride, here), here);
  }
}

inline void widen(Element type, const void* from, int64_t count, int64_t stride, float* out) {
  if (type == Element::f32) widen_of<F32>(from, count, stride, out);
  else if (type == Element::bf16) widen_of<Bf16>(from, count, stride, out);
  else widen_of<F16>(from, count, stride, out);
}

using Sums = float (*)[kSpreadColumns];

// sums[row][c] += t[row][j] * b[j][c] for `ranks` rows of b, j ascending.
template <class E, int ranks>
inline void add_ranks(const Spread& w, const typename E::T* b, const float* t, Sums sums) {
  const int64_t n = w.delta->n, ldt = w.delta->rank;
  for (int64_t c = 0; c < w.count; c += 16) {
    const int64_t left = w.count - c;
    Floats16 from[ranks];
    DFK_EACH(j, ranks) {
      from[j] = left >= 16 ? E::at(b + j * n + c) : E::at(b + j * n + c, left);
      __builtin_prefetch(b + (j + ranks) * n + c, 0, 2);  // may lie outside of b: a prefetch never faults
    }
    for (int64_t r = 0; r < w.rows; ++r) {
      float* const to = sums[r] + c;
      Floats16 sum = load(to);
      DFK_EACH(j, ranks) sum = fma(floats16(t[r * ldt + j]), from[j], sum);
      store(to, sum);
    }
  }
}

template <class E> void spread_of(const Spread& w) {
  alignas(64) float sums[kSpreadRows][kSpreadColumns];
  const Delta& d = *w.delta;
  const int64_t wide = round_up(w.count, 16);
  for (int64_t r = 0; r < w.rows; ++r) std::memset(sums[r], 0, static_cast<size_t>(wide) * sizeof(float));
  const auto* b = static_cast<const typename E::T*>(d.b) + w.first;
  int64_t j = 0;
  for (; j + 4 <= d.rank; j += 4) add_ranks<E, 4>(w, b + j * d.n, w.t + j, sums);
  for (; j < d.rank; ++j) add_ranks<E, 1>(w, b + j * d.n, w.t + j, sums);
  for (int64_t r = 0; r < w.rows; ++r) {
    float* const y = w.y + w.row[r] * w.ldy + w.column;
    for (int64_t c = 0; c < w.count; c += 16) {
      const int64_t left = w.count - c;
      float* const to = y + c / 32 * w.stride + c % 32;
      Floats16 v = load_up_to(to, left) + load(sums[r] + c);
      if (d.factor) v = v * load_up_to(d.factor + w.first + c, left);
      if (d.shift) v = v + load_up_to(d.shift + w.first + c, left);
      store_up_to(to, v, left);
    }
  }
}

inline void spread(const Spread& w) {
  if (w.delta->type == Element::f32) spread_of<F32>(w);
  else if (w.delta->type == Element::bf16) spread_of<Bf16>(w);
  else spread_of<F16>(w);
}

}  // namespace dfk::DFK_ISA::low_rank
