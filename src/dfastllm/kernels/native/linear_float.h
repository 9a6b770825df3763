// Panels of float and bf16 weights.
//
// Every output is one chain of fused multiply-adds over k = 0, 1, 2, ...; which rows share a register tile changes
// nothing. bf16 on AVX-512 uses vdpbf16ps: pairs of inputs (2i, 2i + 1) are multiplied and added with one rounding each
// way of its own, and denormal inputs and sums count as zero. So bf16 results differ between instruction sets by float
// rounding (and float results where the baseline has no fused multiply-add), never between rows.
//
// As the integer tiles do (linear_tiles.h), several row blocks pass over a slice of the panel that the L1 cache holds,
// and the slice after it is prefetched meanwhile. The sums wait in the tile's memory between slices, as the floats they
// are, so slices change no bit. Few rows are one block: then the panel is read in one pass, which the hardware
// prefetchers follow.
#pragma once

#include <cstdint>

#include "linear.h"
#include "linear_walk.h"
#include "simd.h"
#include "unroll.h"

namespace dfk::DFK_ISA {

constexpr int64_t kTurn = 16;  // inputs between two prefetches; a slice is a multiple of it
constexpr int kMemoryRows = 11;  // with no more, a product waits for memory

// Rows of a register tile, at most, times 16 channels: 6 x 4 accumulators of 32 registers, 4 of weights, 1 broadcast; of
// 16 registers 12, 2 or 4 of weights, 1 or 2 broadcasts.
#if defined(DFK_SIMD_AVX512)
constexpr int kFloatRows = 6, kFloatWidth = 4;
#elif defined(DFK_SIMD_AVX2)
constexpr int kFloatRows = 6, kFloatWidth = 1;
#elif defined(DFK_SIMD_NEON)  // 20 of 32 registers, 8 of weights (bfloat16)
constexpr int kFloatRows = 5, kFloatWidth = 1;
#else
constexpr int kFloatRows = 2, kFloatWidth = 1;
#endif

template <int rows> struct FloatSums { Floats16 at[rows][kFloatWidth]; };

template <int rows>
DFK_INLINE void add_inputs(const float* w, const float* x, int64_t stride, int64_t k, FloatSums<rows>& sum, Ahead* ahead) {
  for (int64_t i = 0; i < k; ++i, w += kPanel) {
    if (i % kTurn == 0 && ahead) ahead->turn();
    Floats16 weights[kFloatWidth];
    DFK_EACH(c, kFloatWidth) weights[c] = load(w + 16 * c);
    DFK_EACH(r, rows) {
      const Floats16 a = floats16(x[r * stride + i]);
      DFK_EACH(c, kFloatWidth) sum.at[r][c] = multiply_add(a, weights[c], sum.at[r][c]);
    }
  }
}

template <int rows>
DFK_INLINE void add_inputs(const uint16_t* w, const uint16_t* x, int64_t stride, int64_t k, FloatSums<rows>& sum,
                       Ahead* ahead) {
  for (int64_t i = 0; i < k; i += 2, w += 2 * kPanel) {
    if (i % kTurn == 0 && ahead) ahead->turn();
    Bf16Pairs weights[kFloatWidth];
    DFK_EACH(c, kFloatWidth) weights[c] = bf16_pairs(w + 32 * c);
    DFK_EACH(r, rows) {
      const Bf16Pairs a = two_bf16(x + r * stride + i);
      DFK_EACH(c, kFloatWidth) sum.at[r][c] = add_bf16_pairs(sum.at[r][c], weights[c], a);
    }
  }
}

template <int rows, class T>
inline void float_rows(const T* w, const T* x, int64_t stride, int64_t k, bool first, float* tile, Ahead& ahead) {
  constexpr int64_t unit = 4 / sizeof(T);  // inputs of a channel that lie together
  for (int c = 0; c < kPanel; c += 16 * kFloatWidth) {
    FloatSums<rows> sum;
    DFK_EACH(r, rows) {
      DFK_EACH(j, kFloatWidth) sum.at[r][j] = first ? floats16(0.0f) : load(tile + r * kPanel + c + 16 * j);
    }
    add_inputs<rows>(w + c * unit, x, stride, k, sum, c == 0 ? &ahead : nullptr);
    DFK_EACH(r, rows) {
      DFK_EACH(j, kFloatWidth) store(tile + r * kPanel + c + 16 * j, sum.at[r][j]);
    }
  }
}

template <class T, int R = 1>
inline void float_block(int rows, const T* w, const T* x, int64_t stride, int64_t k, bool first, float* tile,
                        Ahead& ahead) {
  if constexpr (R < kFloatRows) {
    if (rows > R) return float_block<T, R + 1>(rows, w, x, stride, k, first, tile, ahead);
  }
  float_rows<R>(w, x, stride, k, first, tile, ahead);
}

template <class T>
inline void float_tile(const Linear& w, const Acts& acts, int64_t panel, int64_t row0, int64_t rows, float* tile) {
  constexpr int64_t slice = 131072 / (kPanel * sizeof(T));  // inputs: this slice and the next fit the L2 cache
  const int64_t k = round_up(w.k, 4 / sizeof(T)), s = acts.stride, blocks = (rows + kFloatRows - 1) / kFloatRows;
  const T* data = static_cast<const T*>(w.data) + panel * k * kPanel;
  const T* x = static_cast<const T*>(acts.data) + row0 * s;
  const bool compute = rows > kMemoryRows;
  const int64_t step = compute ? slice : k;
  for (int64_t at = 0; at < k; at += step) {
    const int64_t here = k - at < step ? k - at : step, left = k - at - here, next = left > 0 ? left : k;
    const int64_t fetch = !compute ? 0 : (next < slice ? next : slice) * kPanel * static_cast<int64_t>(sizeof(T));
    Ahead ahead(data + (at + here) * kPanel, fetch, (here + kTurn - 1) / kTurn * blocks);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t r = kFloatRows * i;
      const RowBlock block = compute ? row_block(rows, blocks, i) : RowBlock{r, static_cast<int>(rows - r)};
      float_block<T>(block.rows, data + at * kPanel, x + block.first * s + at, s, here, at == 0,
                     tile + block.first * kPanel, ahead);
    }
  }
}

}  // namespace dfk::DFK_ISA
