// Low-rank products: t = scale * A x cut into tasks for the pool, B t for tiles of a linear or for all of its output.
#include "low_rank.h"

#include <algorithm>

#include "pool.h"

namespace dfk {
namespace {

constexpr int64_t kPieceRows = 8;      // of a task of the first half: its rows of x stay in a core's L2
constexpr int64_t kPieceRanks = 4;     // at least, of such a task
constexpr int64_t kPieceColumns = 512; // of a task of `apply`
constexpr int64_t kPieceOutputs = 64;  // of a task of natural_linear
constexpr int64_t kLine = 64;          // bytes

}  // namespace

// What of a place lies in the panel of columns [column, column + kPanel): `count` of its outputs (0 or less: none) from
// number `skip` on, at `column` of the panel.
struct LowRank::Overlap {
  int64_t skip, count, column;

  static Overlap of(const Place& p, int64_t column) {
    if (p.stride == kPanel) {  // one half of every panel
      const int64_t skip = (column - p.column / kPanel * kPanel) / 2;
      return {skip, skip < 0 ? 0 : std::min(kPanel / 2, p.count - skip), p.column % kPanel};
    }
    const int64_t before = column - p.column, skip = std::max<int64_t>(before, 0), at = skip - before;
    return {skip, std::min(kPanel - at, p.count - skip), at};
  }
};

bool fits(const Delta& delta, int64_t k, int64_t columns) {
  const auto within = [&](const Place& p) {
    const int64_t last = p.column + (p.count - 1) / 32 * p.stride + (p.count - 1) % 32;
    const bool plain = p.stride == 32, halves = p.stride == kPanel && p.column % 32 == 0;
    return p.first >= 0 && p.count > 0 && p.first + p.count <= delta.n && p.column >= 0 && (plain || halves) && last < columns;
  };
  return (delta.rank == 0 || delta.k == k) && std::all_of(delta.places.begin(), delta.places.end(), within);
}

void LowRank::clear() {
  groups_.clear();
  rows_.clear();
  sums_ = 0;
}

void LowRank::add(const std::vector<Delta>& deltas, const int32_t* rows, int64_t count) {
  const int64_t row0 = static_cast<int64_t>(rows_.size());
  rows_.insert(rows_.end(), rows, rows + count);
  for (const Delta& delta : deltas) {
    groups_.push_back({&delta, row0, count, sums_});
    sums_ += count * delta.rank;
  }
}

void LowRank::take(const float* x, int64_t ldx, int64_t k, const float* norm, float eps) {
  t_.floats(static_cast<size_t>(sums_));
  pieces_.clear();
  int64_t most = 0;
  for (size_t g = 0, last; g < groups_.size(); g = last) {
    for (last = g; last < groups_.size() && groups_[last].row0 == groups_[g].row0; ++last) {
      most = std::max(most, groups_[last].delta->rank);
    }
    for (int64_t row = 0; row < groups_[g].rows; row += kPieceRows) {
      pieces_.push_back({g, last, row, std::min(kPieceRows, groups_[g].rows - row), 0});
    }
  }
  if (most == 0) return;
  // Few rows: their ranks are shared out too, so that every thread has work.
  const int64_t count = static_cast<int64_t>(pieces_.size()), threads = thread_count();
  const int64_t wanted = threads == 1 ? 1 : (4 * threads + count - 1) / count;
  const int64_t parts = std::min(wanted, (most + kPieceRanks - 1) / kPieceRanks);
  parallel(count * parts, [&](int64_t task, int) {
    Piece piece = pieces_[static_cast<size_t>(task / parts)];
    piece.part = task % parts;
    take_piece(piece, parts, x, ldx, k, norm, eps);
  });
}

void LowRank::take_piece(const Piece& piece, int64_t parts, const float* x, int64_t ldx, int64_t k, const float* norm,
                         float eps) {
  const LinearOps& ops = linear_ops();
  const int32_t* row = rows_.data() + groups_[piece.group].row0 + piece.row;
  if (norm != nullptr) {
    const int64_t width = round_up(k, 32);
    float* const rows = reinterpret_cast<float*>(thread_scratch(static_cast<size_t>(piece.rows * width) * sizeof(float)));
    const Acts out{ActKind::f32, piece.rows, k, width, rows, nullptr, nullptr};
    for (int64_t r = 0; r < piece.rows; ++r) ops.prepare_row(x + row[r] * ldx, norm, eps, out, r);
    x = rows;
    ldx = width;
    row = nullptr;
  }
  for (size_t g = piece.group; g < piece.last; ++g) {
    const Delta& d = *groups_[g].delta;
    const int64_t share = round_up((d.rank + parts - 1) / parts, kPieceRanks), first = piece.part * share;
    if (first >= d.rank) continue;
    const char* const a = static_cast<const char*>(d.a) + first * k * element_bytes(d.type);
    float* const t = t_.floats(0) + groups_[g].t + piece.row * d.rank + first;
    ops.dots(d.type, a, k, std::min(share, d.rank - first), x, ldx, row, piece.rows, d.scale, t, d.rank);
  }
}

template <class F>
void LowRank::each_stretch(int64_t column, int64_t row0, int64_t rows, F&& f) const {
  const int32_t *of = nullptr, *first = nullptr, *last = nullptr;
  for (const Group& g : groups_) {
    const int32_t* const all = rows_.data() + g.row0;
    if (all[0] >= row0 + rows || all[g.rows - 1] < row0) continue;
    if (all != of) {
      of = all;
      first = std::lower_bound(all, all + g.rows, row0);
      last = std::lower_bound(first, all + g.rows, row0 + rows);
    }
    if (first == last) continue;
    for (const Place& p : g.delta->places) {
      const Overlap at = Overlap::of(p, column);
      if (at.count > 0) f(g, p.first + at.skip, at, first, last - first);
    }
  }
}

void LowRank::fetch(int64_t column, int64_t row0, int64_t rows) const {
  each_stretch(column, row0, rows, [](const Group& g, int64_t first, const Overlap& at, const int32_t*, int64_t) {
    const Delta& d = *g.delta;
    const int64_t unit = d.rank * kUnit * element_bytes(d.type);
    const char* b = static_cast<const char*>(d.b) + first / kUnit * unit;
    const char* const end = b + (first % kUnit + at.count + kUnit - 1) / kUnit * unit;
    for (; b < end; b += kLine) __builtin_prefetch(b, 0, 2);
  });
}

void LowRank::add_to(float* tile, int64_t column, int64_t row0, int64_t rows) const {
  const auto spread = linear_ops().spread;
  const float* const sums = static_cast<const float*>(t_.data());
  each_stretch(column, row0, rows, [&](const Group& g, int64_t first, const Overlap& at, const int32_t* row, int64_t here) {
    const float* const t = sums + g.t + (row - rows_.data() - g.row0) * g.delta->rank;
    spread({g.delta, first, at.count, t, row, here, row0, tile + at.column, kPanel});
  });
}

void LowRank::apply(float* y, int64_t ldy) const {
  const auto spread = linear_ops().spread;
  const float* const sums = static_cast<const float*>(t_.data());
  for (const Group& g : groups_) {
    for (const Place& p : g.delta->places) {
      const int64_t wide = p.stride == 32 ? kPieceColumns : 32, pieces = (p.count + wide - 1) / wide;
      const int64_t blocks = (g.rows + kPieceRows - 1) / kPieceRows;
      parallel(pieces * blocks, [&](int64_t task, int) {
        const int64_t c = task / blocks * wide, row = task % blocks * kPieceRows;
        spread({g.delta, p.first + c, std::min(wide, p.count - c), sums + g.t + row * g.delta->rank,
                rows_.data() + g.row0 + row, std::min(kPieceRows, g.rows - row), 0, y + p.column + c / 32 * p.stride, ldy});
      });
    }
  }
}

void natural_linear(Element type, const void* a, int64_t n, int64_t k, const float* x, int64_t ldx, int64_t rows, float* y,
                    int64_t ldy) {
  const LinearOps& ops = linear_ops();
  parallel((n + kPieceOutputs - 1) / kPieceOutputs, [&](int64_t task, int) {
    const int64_t first = task * kPieceOutputs;
    const char* const from = static_cast<const char*>(a) + first * k * element_bytes(type);
    ops.dots(type, from, k, std::min(kPieceOutputs, n - first), x, ldx, nullptr, rows, 1.0f, y + first, ldy);
  });
}

}  // namespace dfk
