// The driver of the linear layers: cuts a product into tasks of panels and rows for the pool, and finishes the tiles.
#include "linear.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu.h"
#include "pool.h"
#include "scratch.h"

namespace dfk {
namespace {

// Rows of a tile call. Enough to pay for unpacking 4-bit panels; the tile (32 KB) and a panel stay in a core's L2.
constexpr int64_t kRows = 128;

// A thread's memory: kTileScratch for the kernel, then the tile.
constexpr size_t kTaskBytes = kTileScratch + kRows * kPanel * sizeof(float);

int64_t panels_of(const Linear& w) { return (w.n + kPanel - 1) / kPanel; }

// How a product is cut into tasks: `across` stretches of neighbouring panels (as even as possible; each one stretch of
// memory, which the hardware prefetchers like) by `down` blocks of `rows` rows.
struct Cut {
  int64_t across, down, rows;
};

// A few tasks per thread, so that a thread that loses its core does not hold up the rest; rows are divided (and panels
// read again) only where there are too few panels to go round.
Cut cut(int64_t panels, int64_t rows) {
  const int64_t threads = thread_count();
  if (threads == 1) return {1, 1, rows};
  if (panels >= 16 * threads) return {8 * threads, 1, rows};
  if (panels >= 4 * threads || rows <= 32) return {panels < 4 * threads ? panels : 4 * threads, 1, rows};
  const int64_t parts = (4 * threads + panels - 1) / panels, block = round_up((rows + parts - 1) / parts, 32);
  return {panels, (rows + block - 1) / block, block};
}

// finish(panel, row0, rows, tile) for every panel and block of rows, on the pool.
template <class Finish>
void each_tile(const Linear& w, const Acts& x, Finish&& finish) {
  const int64_t panels = panels_of(w);
  const auto tile_of = linear_ops().tile[static_cast<int>(w.format)];
  const Cut c = cut(panels, x.rows);
  parallel(c.across * c.down, [&](int64_t task, int) {
    char* memory = thread_scratch(kTaskBytes);
    float* tile = reinterpret_cast<float*>(memory + kTileScratch);
    const int64_t part = task / c.down, top = task % c.down * c.rows;
    const int64_t last = panels * (part + 1) / c.across, end = top + c.rows < x.rows ? top + c.rows : x.rows;
    for (int64_t panel = panels * part / c.across; panel < last; ++panel) {
      for (int64_t row = top; row < end; row += kRows) {
        const int64_t rows = end - row < kRows ? end - row : kRows;
        tile_of(w, x, panel, row, rows, tile, memory);
        finish(panel, row, rows, tile);
      }
    }
  });
}

}  // namespace

const LinearOps& linear_ops() {
#if defined(DFK_X86)
  static const LinearOps& chosen =
      isa() == Isa::avx512 ? linear_avx512 : isa() == Isa::avx2 ? linear_avx2 : linear_scalar;
  return chosen;
#else
  return linear_scalar;
#endif
}

namespace {

struct ActsLayout {
  int64_t stride, scales, sums;  // elements
  size_t data_bytes, scales_bytes, sums_bytes;
};

ActsLayout layout(ActKind kind, int64_t rows, int64_t k) {
  ActsLayout out{round_up(k, 32), 0, 0, 0, 0, 0};
  const int64_t width = kind == ActKind::f32 ? 4 : kind == ActKind::bf16 ? 2 : 1;
  if (kind == ActKind::row8) out.scales = out.sums = rows;
  if (kind == ActKind::group8) {
    out.scales = rows * out.stride / 32;
    out.sums = rows * out.stride / 16;
  }
  out.data_bytes = static_cast<size_t>(round_up(rows * out.stride * width, 64));
  out.scales_bytes = static_cast<size_t>(round_up(out.scales * 4, 64));
  out.sums_bytes = static_cast<size_t>(round_up(out.sums * 4, 64));
  return out;
}

}  // namespace

size_t acts_bytes(ActKind kind, int64_t rows, int64_t k) {
  const ActsLayout at = layout(kind, rows, k);
  return at.data_bytes + at.scales_bytes + at.sums_bytes;
}

Acts acts_at(void* memory, ActKind kind, int64_t rows, int64_t k) {
  const ActsLayout at = layout(kind, rows, k);
  char* base = static_cast<char*>(memory);
  Acts out{kind, rows, k, at.stride, memory, nullptr, nullptr};
  if (at.scales) {
    out.scales = reinterpret_cast<float*>(base + at.data_bytes);
    out.sums = reinterpret_cast<int32_t*>(base + at.data_bytes + at.scales_bytes);
  }
  return out;
}

void prepare(const float* x, int64_t ldx, const float* norm, float eps, const Acts& out) {
  const auto prepare_row = linear_ops().prepare_row;
  const int64_t step = 1 + 8192 / out.stride;  // rows that are worth a task
  parallel((out.rows + step - 1) / step, [&](int64_t task, int) {
    const int64_t end = (task + 1) * step < out.rows ? (task + 1) * step : out.rows;
    for (int64_t row = task * step; row < end; ++row) prepare_row(x + row * ldx, norm, eps, out, row);
  });
}

void linear(const Linear& w, const Acts& x, float* y, int64_t ldy, bool accumulate) {
  const auto write = linear_ops().write_tile;
  each_tile(w, x, [&](int64_t panel, int64_t row, int64_t rows, const float* tile) {
    const int64_t channel = panel * kPanel, left = w.n - channel;
    write(tile, rows, left < kPanel ? left : kPanel, w.bias ? w.bias + channel : nullptr, y + row * ldy + channel, ldy,
          accumulate);
  });
}

void linear_swiglu(const Linear& w, const Acts& x, float* h, const Acts& out) {
  const LinearOps& ops = linear_ops();
  constexpr int64_t half = kPanel / 2;
  const bool through_h = out.kind == ActKind::row8;
  each_tile(w, x, [&](int64_t panel, int64_t row, int64_t rows, float* tile) {
    const int64_t column = panel * half, width = out.k - column < half ? out.k - column : half;
    if (width <= 0) return;
    if (w.bias) ops.write_tile(tile, rows, kPanel, w.bias + panel * kPanel, tile, kPanel, false);
    for (int64_t r = 0; r < rows; ++r) {
      alignas(64) float product[half] = {};
      float* to = through_h ? h + (row + r) * out.k + column : product;
      ops.silu_mul(tile + r * kPanel, tile + r * kPanel + half, to, width);
      if (!through_h) ops.prepare_32(product, out, row + r, column);
    }
  });
  if (through_h) prepare(h, out.k, nullptr, 0.0f, out);
}

}  // namespace dfk
