// The driver of the linear layers: cuts a product into tasks of panels and rows for the pool, and finishes the tiles.
#include "linear.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu.h"
#include "low_rank.h"
#include "pool.h"
#include "scratch.h"

namespace dfk {
namespace {

// Rows of a tile call. Enough to pay for unpacking 4-bit panels; the tile (32 KB) and a panel stay in a core's L2.
constexpr int64_t kRows = 128;

// A thread's memory: kTileScratch for the kernel, then the tile.
constexpr size_t kTaskBytes = kTileScratch + kRows * kPanel * sizeof(float);

int64_t panels_of(const Linear& w) { return (w.n + kPanel - 1) / kPanel; }

// Rows of a piece of work: a whole tile call, or fewer where there are too few panels to go round (then panels are read
// again).
int64_t piece_rows(int64_t panels, int64_t rows) {
  const int64_t threads = thread_count(), most = rows < kRows ? rows : kRows;
  if (threads == 1 || panels >= 4 * threads || rows <= 32) return most;
  const int64_t parts = (4 * threads + panels - 1) / panels, block = round_up((rows + parts - 1) / parts, 32);
  return block < most ? block : most;
}

// Pieces 0 .. count - 1 in stretches, large ones first, single pieces in the end: a thread walks through neighbouring
// panels (one stretch of memory, which the hardware prefetchers like), and nobody waits long for the last one. With
// stretches of equal size 14 panels took two threads as long as 16.
class Stretches {
 public:
  explicit Stretches(int64_t count) : count_(count), share_(thread_count() == 1 ? 1 : 2 * thread_count()) {}

  // Takes [first, last); false when nothing is left.
  bool take(int64_t& first, int64_t& last) {
    first = next_.load(std::memory_order_relaxed);
    do {
      if (first >= count_) return false;
      last = first + (count_ - first + share_ - 1) / share_;
    } while (!next_.compare_exchange_weak(first, last, std::memory_order_relaxed));
    return true;
  }

 private:
  const int64_t count_, share_;
  std::atomic<int64_t> next_{0};
};

// How a share is cut: into panels times blocks of `block` rows, which are pieces from `first` of the whole work on.
struct Cut {
  int64_t first, block, blocks;
};

// finish(w, panel, row0, rows, tile) for every panel and block of rows of every share, on the pool.
template <class Finish>
void each_tile(const Share* shares, int64_t count, const Acts& x, const Adapted& adapted, Finish&& finish) {
  if (count <= 0) return;
  const int64_t panels = panels_of(*shares[0].w);
  Cut single;
  std::vector<Cut> several(static_cast<size_t>(count > 1 ? count : 0));
  Cut* const cuts = count > 1 ? several.data() : &single;
  int64_t pieces = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t rows = shares[i].rows, block = piece_rows(panels * count, rows);
    const int64_t blocks = rows > 0 ? (rows + block - 1) / block : 0;
    cuts[i] = {pieces, block, blocks};
    pieces += panels * blocks;
  }
  Stretches stretches(pieces);
  parallel(pieces < thread_count() ? pieces : thread_count(), [&](int64_t, int) {
    char* memory = thread_scratch(kTaskBytes);
    float* tiles = reinterpret_cast<float*>(memory + kTileScratch);
    int64_t at, last, i = 0;
    while (stretches.take(at, last)) {
      while (at < last) {
        while (i + 1 < count && cuts[i + 1].first <= at) ++i;  // stretches come in ascending order
        const Share& share = shares[i];
        const int64_t end = i + 1 < count && cuts[i + 1].first < last ? cuts[i + 1].first : last;
        const auto work = [&](int64_t first, int64_t second) {
          const int64_t piece = first - cuts[i].first, row = piece % cuts[i].blocks * cuts[i].block, left = share.rows - row;
          const int64_t rows = left < cuts[i].block ? left : cuts[i].block;
          const Panels panels{{piece / cuts[i].blocks, second < 0 ? -1 : second - cuts[i].first}};
          for (int p = 0; adapted.work && p < panels.count(); ++p) {
            adapted.work->fetch(adapted.column + panels.at[p] * kPanel, share.row0 + row, rows);
          }
          linear_ops().tile[static_cast<int>(share.w->format)](*share.w, x, panels, share.row0 + row, rows, tiles, memory);
          for (int p = 0; p < panels.count(); ++p) {
            finish(*share.w, panels.at[p], share.row0 + row, rows, tiles + p * rows * kPanel);
          }
        };
        // The first half of a stretch beside the second.
        const bool paired = share.rows <= linear_ops().paired_rows[static_cast<int>(share.w->format)];
        const int64_t pairs = paired ? (end - at) / 2 : 0, middle = end - pairs;
        for (int64_t p = 0; p < pairs; ++p) work(at + p, middle + p);
        for (at += pairs; at < middle; ++at) work(at, -1);
        at = end;
      }
    }
  });
}

}  // namespace

const LinearOps& linear_ops() {
  switch (isa()) {
#if defined(DFK_X86)
    case Isa::avx512: return linear_avx512;
    case Isa::avx512vl: return linear_avx512vl;
#if defined(DFK_AVXVNNI)
    case Isa::avxvnni: return linear_avxvnni;
#endif
    case Isa::avx2: return linear_avx2;
#elif defined(DFK_ARM)
    case Isa::i8mm: return linear_i8mm;
    case Isa::dotprod: return linear_dotprod;
    case Isa::neon: return linear_neon;
#endif
    default: return linear_scalar;
  }
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

void prepare_turned(const float* x, int64_t ldx, int64_t block, const Acts& out) {
  const LinearOps& ops = linear_ops();
  const int64_t step = 1 + 4096 / out.stride;
  parallel((out.rows + step - 1) / step, [&](int64_t task, int) {
    float* const turned = reinterpret_cast<float*>(thread_scratch(static_cast<size_t>(out.k) * sizeof(float)));
    const int64_t end = (task + 1) * step < out.rows ? (task + 1) * step : out.rows;
    for (int64_t row = task * step; row < end; ++row) {
      ops.hadamard(x + row * ldx, out.k, block, turned);
      ops.prepare_row(turned, nullptr, 0.0f, out, row);
    }
  });
}

void linear(const Share* shares, int64_t count, const Acts& x, float* y, int64_t ldy, bool accumulate, const Adapted& adapted) {
  const auto write = linear_ops().write_tile;
  each_tile(shares, count, x, adapted, [&](const Linear& w, int64_t panel, int64_t row, int64_t rows, float* tile) {
    const int64_t channel = panel * kPanel, left = w.n - channel, channels = left < kPanel ? left : kPanel;
    const float* bias = w.bias ? w.bias + channel : nullptr;
    if (adapted.work) {
      if (bias) write(tile, rows, channels, bias, tile, kPanel, false);
      bias = nullptr;
      adapted.work->add_to(tile, adapted.column + channel, row, rows);
    }
    write(tile, rows, channels, bias, y + row * ldy + channel, ldy, accumulate);
  });
}

void softcap(float* x, int64_t count, float cap) {
  constexpr int64_t piece = 1 << 14;
  const auto capped = linear_ops().softcap;
  parallel((count + piece - 1) / piece, [&](int64_t task, int) {
    const int64_t left = count - task * piece;
    capped(x + task * piece, left < piece ? left : piece, cap);
  });
}

void linear_gated(const Share* shares, int64_t count, const Acts& x, Activation activation, float* h, const Acts& out,
                  int64_t block, const Adapted& adapted, bool keep) {
  const LinearOps& ops = linear_ops();
  const auto gate_mul = ops.gate_mul[static_cast<int>(activation)];
  constexpr int64_t half = kPanel / 2;
  const bool through_h = out.kind == ActKind::row8 || block > 1;
  each_tile(shares, count, x, adapted, [&](const Linear& w, int64_t panel, int64_t row, int64_t rows, float* tile) {
    const int64_t column = panel * half, width = out.k - column < half ? out.k - column : half;
    if (width <= 0) return;
    if (w.bias) ops.write_tile(tile, rows, kPanel, w.bias + panel * kPanel, tile, kPanel, false);
    if (adapted.work) adapted.work->add_to(tile, panel * kPanel, row, rows);
    for (int64_t r = 0; r < rows; ++r) {
      alignas(64) float product[half];  // zeroed where it must be only: GCC does it with `rep stos`, 4 % of a forward
      if (width < half) std::fill(product + width, product + half, 0.0f);
      float* to = through_h ? h + (row + r) * out.k + column : product;
      gate_mul(tile + r * kPanel, tile + r * kPanel + half, to, width);
      if (!through_h) ops.prepare_32(product, out, row + r, column);
      if (!through_h && keep) std::memcpy(h + (row + r) * out.k + column, product, static_cast<size_t>(width) * sizeof(float));
    }
  });
  if (block > 1) prepare_turned(h, out.k, block, out);
  else if (through_h) prepare(h, out.k, nullptr, 0.0f, out);
}

}  // namespace dfk
