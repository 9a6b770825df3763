// Integer tiles: one panel (64 output channels) times rows of int8 codes -> float [rows][64]. Included inside a
// translation unit's own namespace, after <immintrin.h> (x86), <cstring> and linear.h; tiles::w8, w8g, w4g and w6g are
// of the type of LinearOps::tile.
//
// Weights are the unsigned operand of the dot product (u8 x s8), so their codes are stored with an offset (128, 8 or
// 32). Integer sums start at -offset * sum(activation codes) instead of zero, which takes it off again, exactly.
//
// What is computed, in this order whatever the number of rows (each line one rounding; fma where the instruction set
// has it, else two):
//   w8          y = (float(sum) * scale[n]) * act_scale[m]                          sum over the whole k
//   w8g, w4g    y = fma(float(sum_g) * scale[g, n], act_scale[m, g], y)             g = 0, 1, 2, ... from y = 0
//   w6g         y = fma(fma(float(sum_b), scale[b, n], float(sum_a) * scale[a, n]), act_scale[m, g], y)
//               a, b: the two halves of 16 inputs of group g
//   with minima, after each group: y = fma(-min[g, n], act_scale[m, g] * float(code_sum[m, g]), y), each half of w6g
// w8 sums fit 32 bits for k up to 133,152 (2^31 / 127^2), past any model's.
//
// The panel is walked in slices of 256 inputs (at most 16 KB, half of the L1 cache) and all row blocks of the call pass
// over a slice. With more than one row block the slice after it is prefetched meanwhile, a little at a time. Panels lie
// one after another, so the prefetch runs on into the next one; at the end of the matrix it runs past it, which is
// allowed (prefetches never fault).
namespace tiles {

constexpr int kSlice = 8;  // groups of 32 inputs

// Lines to fetch ahead while a slice is worked on, shared out evenly over the `turns` (groups x row blocks) of it.
struct Ahead {
  const char* at;
  const char* end;
  int64_t step;  // bytes a turn, a multiple of 64
  Ahead(const void* from, int64_t bytes, int64_t turns)
      : at(static_cast<const char*>(from)), end(at + bytes), step(round_up((bytes + turns - 1) / turns, 64)) {}
  inline void turn() {
    const char* const stop = at + step < end ? at + step : end;
    for (; at < stop; at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// Row block `i` of `count` blocks as even as possible over `rows`: [first, first + rows).
struct RowBlock {
  int64_t first;
  int rows;
};
inline RowBlock row_block(int64_t rows, int64_t count, int64_t i) {
  const int64_t first = rows * i / count;
  return {first, static_cast<int>(rows * (i + 1) / count - first)};
}

// Bytes of 32 inputs of a panel.
constexpr int64_t group_bytes(Format f) { return f == Format::w4g ? 1024 : f == Format::w6g ? 1536 : 2048; }

#if defined(__AVX512VNNI__)
#include "linear_tiles_avx512.h"
#else
#include "linear_tiles_scalar.h"
#endif

}  // namespace tiles
