// Low-rank products on the pool: cut into tasks, both halves one after the other.
#include "low_rank.h"

#include <algorithm>

#include "pool.h"

namespace dfk {
namespace {

constexpr int64_t kPieceRanks = 8, kPieceRows = 32;  // of a task of the first half
constexpr int64_t kPieceOutputs = 64;                // of a task of natural_linear

}  // namespace

bool fits(const Delta& delta, int64_t k, int64_t columns) {
  const auto within = [&](const Place& p) {
    const int64_t last = p.column + (p.count - 1) / 32 * p.stride + (p.count - 1) % 32;
    return p.first >= 0 && p.count > 0 && p.first + p.count <= delta.n && p.column >= 0 && p.stride >= 32 && last < columns;
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

void LowRank::gather(const float* x, int64_t ldx, int64_t k, const float* norm, float eps) {
  const int64_t rows = static_cast<int64_t>(rows_.size());
  in_ = acts_at(x_.bytes(acts_bytes(ActKind::f32, rows, k)), ActKind::f32, rows, k);
  const auto prepare_row = linear_ops().prepare_row;
  const int64_t step = 1 + 8192 / in_.stride;
  parallel((rows + step - 1) / step, [&](int64_t task, int) {
    const int64_t end = std::min(rows, (task + 1) * step);
    for (int64_t i = task * step; i < end; ++i) prepare_row(x + rows_[static_cast<size_t>(i)] * ldx, norm, eps, in_, i);
  });
}

void LowRank::apply(float* y, int64_t ldy) {
  const LinearOps& ops = linear_ops();
  float* const t = t_.floats(static_cast<size_t>(sums_));
  const float* const x = static_cast<const float*>(in_.data);
  pieces_.clear();
  spreads_.clear();
  for (const Group& g : groups_) {
    const Delta& d = *g.delta;
    for (int64_t rank = 0; rank < d.rank; rank += kPieceRanks) {
      for (int64_t row = 0; row < g.rows; row += kPieceRows) {
        pieces_.push_back({&d, rank, std::min(kPieceRanks, d.rank - rank), g.row0 + row, std::min(kPieceRows, g.rows - row),
                           g.t + row * d.rank + rank});
      }
    }
    for (const Place& p : d.places) {
      for (int64_t c = 0; c < p.count; c += kSpreadColumns) {
        for (int64_t row = 0; row < g.rows; row += kSpreadRows) {
          spreads_.push_back({&d, p.first + c, std::min(kSpreadColumns, p.count - c), p.column + c / 32 * p.stride, p.stride,
                              t + g.t + row * d.rank, rows_.data() + g.row0 + row, std::min(kSpreadRows, g.rows - row), y,
                              ldy});
        }
      }
    }
  }
  parallel(static_cast<int64_t>(pieces_.size()), [&](int64_t task, int) {
    const Piece& p = pieces_[static_cast<size_t>(task)];
    const Delta& d = *p.delta;
    const char* const a = static_cast<const char*>(d.a) + p.rank0 * d.k * element_bytes(d.type);
    ops.dots(d.type, a, d.k, p.ranks, x + p.row0 * in_.stride, in_.stride, p.rows, d.scale, t + p.t, d.rank);
  });
  parallel(static_cast<int64_t>(spreads_.size()), [&](int64_t task, int) { ops.spread(spreads_[static_cast<size_t>(task)]); });
}

void natural_linear(Element type, const void* a, int64_t n, int64_t k, const float* x, int64_t ldx, int64_t rows, float* y,
                    int64_t ldy) {
  const LinearOps& ops = linear_ops();
  parallel((n + kPieceOutputs - 1) / kPieceOutputs, [&](int64_t task, int) {
    const int64_t first = task * kPieceOutputs;
    const char* const from = static_cast<const char*>(a) + first * k * element_bytes(type);
    ops.dots(type, from, k, std::min(kPieceOutputs, n - first), x, ldx, rows, 1.0f, y + first, ldy);
  });
}

}  // namespace dfk
