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
constexpr int kRanks = 4, kRows = 4, kVectors = 4;
#else
constexpr int kRanks = 2, kRows = 2, kVectors = 2;
#endif

// Rows of inputs: row r of those at hand is row index[r] of x, or r where index is null.
struct Inputs {
  const float* x;
  int64_t ldx;
  const int32_t* index;
  const float* at(int64_t r) const { return x + (index ? index[r] : r) * ldx; }
};

template <class E, int ranks, int rows>
inline void dot_block(const typename E::T* a, int64_t k, const Inputs& x, int64_t row, float scale, float* out, int64_t ldo) {
  constexpr int lines = ranks * 16 * int{sizeof(typename E::T)} / 64;
  Floats16 sums[ranks][rows];
  const float* from[rows];
  DFK_EACH(r, rows) { from[r] = x.at(row + r); }
  DFK_EACH(j, ranks) { DFK_EACH(r, rows) { sums[j][r] = floats16(0.0f); } }
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) {
    Floats16 left[ranks];
    DFK_EACH(j, ranks) { left[j] = E::at(a + j * k + i); }
    // The ranks that follow, as many lines as were read: a prefetch beyond the end never faults.
    DFK_EACH(line, lines) { __builtin_prefetch(a + ranks * (k + i) + line * 64 / int{sizeof *a}, 0, 2); }
    DFK_EACH(r, rows) {
      const Floats16 right = load(from[r] + i);
      DFK_EACH(j, ranks) { sums[j][r] = fma(left[j], right, sums[j][r]); }
    }
  }
  if (i < k) {
    DFK_EACH(j, ranks) {
      const Floats16 left = E::at(a + j * k + i, k - i);
      DFK_EACH(r, rows) { sums[j][r] = fma(left, load(from[r] + i, k - i), sums[j][r]); }
    }
  }
  DFK_EACH(r, rows) { DFK_EACH(j, ranks) { out[r * ldo + j] = scale * total(sums[j][r]); } }
}

template <class E, int ranks>
inline void dot_ranks(const typename E::T* a, int64_t k, const Inputs& x, int64_t rows, float scale, float* out, int64_t ldo) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) dot_block<E, ranks, kRows>(a, k, x, r, scale, out + r * ldo, ldo);
  if (kRows > 2 && r + 2 <= rows) {
    dot_block<E, ranks, 2>(a, k, x, r, scale, out + r * ldo, ldo);
    r += 2;
  }
  for (; r < rows; ++r) dot_block<E, ranks, 1>(a, k, x, r, scale, out + r * ldo, ldo);
}

template <class E>
void dots_of(const void* a, int64_t k, int64_t count, const Inputs& x, int64_t rows, float scale, float* out, int64_t ldo) {
  const auto* from = static_cast<const typename E::T*>(a);
  int64_t j = 0;
  for (; j + kRanks <= count; j += kRanks) dot_ranks<E, kRanks>(from + j * k, k, x, rows, scale, out + j, ldo);
  for (; j < count; ++j) dot_ranks<E, 1>(from + j * k, k, x, rows, scale, out + j, ldo);
}

inline void dots(Element type, const void* a, int64_t k, int64_t count, const float* x, int64_t ldx, const int32_t* index,
                 int64_t rows, float scale, float* out, int64_t ldo) {
  const Inputs in{x, ldx, index};
  if (type == Element::f32) dots_of<F32>(a, k, count, in, rows, scale, out, ldo);
  else if (type == Element::bf16) dots_of<Bf16>(a, k, count, in, rows, scale, out, ldo);
  else dots_of<F16>(a, k, count, in, rows, scale, out, ldo);
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

// Outputs [c, c + 16 * vectors) of rows [row, row + rows) of a spread, or the first `left` of them where that is less than 16.
// They begin at a unit of B, or lie within one. A sum runs over the ranks, ascending, before y is added.
template <class E, int vectors, int rows>
inline void spread_block(const Spread& w, int64_t c, int64_t row, int64_t left) {
  const Delta& d = *w.delta;
  const int64_t rank = d.rank, output = w.first + c;
  const auto* b = static_cast<const typename E::T*>(d.b) + output / kUnit * rank * kUnit + output % kUnit;
  const float* const t = w.t + row * rank;
  Floats16 sums[rows][vectors];
  DFK_EACH(r, rows) { DFK_EACH(v, vectors) { sums[r][v] = floats16(0.0f); } }
  for (int64_t j = 0; j < rank; ++j, b += kUnit) {
    Floats16 from[vectors];
    DFK_EACH(v, vectors) {
      from[v] = left >= 16 ? E::at(b + v / 2 * rank * kUnit + v % 2 * 16) : E::at(b, left);
    }
    DFK_EACH(r, rows) {
      const Floats16 by = floats16(t[r * rank + j]);
      DFK_EACH(v, vectors) { sums[r][v] = fma(by, from[v], sums[r][v]); }
    }
  }
  DFK_EACH(r, rows) {
    float* const to = w.y + (w.row[row + r] - w.row0) * w.ldy + c;
    DFK_EACH(v, vectors) {
      const int64_t at = output + 16 * v;
      Floats16 y = load_up_to(to + 16 * v, left) + sums[r][v];
      if (d.factor) y = y * load_up_to(d.factor + at, left);
      if (d.shift) y = y + load_up_to(d.shift + at, left);
      store_up_to(to + 16 * v, y, left);
    }
  }
}

template <class E, int vectors> inline void spread_rows(const Spread& w, int64_t c, int64_t left) {
  int64_t r = 0;
  for (; r + kRows <= w.rows; r += kRows) spread_block<E, vectors, kRows>(w, c, r, left);
  if (kRows > 2 && r + 2 <= w.rows) {
    spread_block<E, vectors, 2>(w, c, r, left);
    r += 2;
  }
  for (; r < w.rows; ++r) spread_block<E, vectors, 1>(w, c, r, left);
}

template <class E> void spread_of(const Spread& w) {
  for (int64_t c = 0; c < w.count;) {
    const int64_t left = w.count - c, lane = (w.first + c) % kUnit;
    if (lane == 0 && left >= 16 * kVectors) {
      spread_rows<E, kVectors>(w, c, 16);
      c += 16 * kVectors;
    } else if (lane == 0 && left >= kUnit) {
      spread_rows<E, 2>(w, c, 16);
      c += kUnit;
    } else {
      const int64_t here = std::min<int64_t>(16, std::min(left, kUnit - lane));
      spread_rows<E, 1>(w, c, here);
      c += here;
    }
  }
}

inline void spread(const Spread& w) {
  if (w.delta->type == Element::f32) spread_of<F32>(w);
  else if (w.delta->type == Element::bf16) spread_of<Bf16>(w);
  else spread_of<F16>(w);
}

}  // namespace dfk::DFK_ISA::low_rank
