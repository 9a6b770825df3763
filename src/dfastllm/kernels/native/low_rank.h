// What adapters add to the rows of a linear y = W x + bias, each row its own adapter's or nothing:
//
//   y <- factor * (y + scale * B (A x)) + shift        dfastllm/lora/adapter.py
//
// t = scale * A x is made before the linear runs, and B t is added to each tile of the linear while it is in a core's
// cache (linear.cpp), so that no pass over y is made for it, and a gate multiplies and rounds what adapters have changed.
//
// A row's result depends on its row of x and y and on its adapter alone: never on other rows or adapters, nor on threads.
// Ranks are not padded.
#pragma once

#include <cstdint>
#include <vector>

#include "linear.h"
#include "scratch.h"

namespace dfk {

enum class Element : int { f32 = 0, bf16 = 1, f16 = 2 };

constexpr int64_t kUnit = 32;  // outputs of B that lie together

constexpr int64_t element_bytes(Element type) { return type == Element::f32 ? 4 : 2; }

// Outputs [first, first + count) of a matrix: output first + i is column `column` + i / 32 * `stride` + i % 32 of y. A
// stride of 32 is plain columns, one of 64 every second half of a panel (gate and up).
struct Place {
  int64_t first, count, column, stride;
};

struct Delta {
  Element type;
  int64_t rank, k, n;   // rank 0: no low-rank part
  const void* a;        // [rank][k]
  const void* b;        // [ceil(n / 32)][rank][32]: units of 32 outputs, so that a tile finds what it needs side by side
  float scale;
  const float* factor;  // [n] or null: 1
  const float* shift;   // [n] or null: 0
  std::vector<Place> places;
};

// Whether a delta's inputs are k values and its outputs lie in y's `columns`.
bool fits(const Delta& delta, int64_t k, int64_t columns);

// Outputs [first, first + count) of a matrix into some rows: row r's are at y + (row[r] - row0) * ldy.
struct Spread {
  const Delta* delta;
  int64_t first, count;
  const float* t;      // [rows][rank], what A x came to, scaled
  const int32_t* row;  // [rows]
  int64_t rows, row0;
  float* y;
  int64_t ldy;
};

// The work of one linear: first all its adapters' rows (`add`), then t of their inputs (`take`), and then either `apply`
// to a whole y, or `fetch` and `add_to` for each of its tiles.
class LowRank {
 public:
  void clear();
  bool empty() const { return rows_.empty(); }
  // Rows of y (ascending for `add_to`), and of the inputs, that these deltas are for. All must outlive the use.
  void add(const std::vector<Delta>& deltas, const int32_t* rows, int64_t count);
  // t out of the rows' inputs x [..][ldx], k values each, with RMSNorm first if norm is not null.
  void take(const float* x, int64_t ldx, int64_t k, const float* norm, float eps);
  // y [..][ldy], all columns and rows.
  void apply(float* y, int64_t ldy) const;
  // Columns [column, column + kPanel) of rows [row0, row0 + rows): a tile [rows][kPanel]; rows as they were added.
  void add_to(float* tile, int64_t column, int64_t row0, int64_t rows) const;
  // Has what `add_to` will read of B brought to the core, while the tile is made.
  void fetch(int64_t column, int64_t row0, int64_t rows) const;

  size_t bytes_held() const { return t_.size(); }

 private:
  struct Overlap;
  struct Group {  // rows of one adapter, for one of its deltas
    const Delta* delta;
    int64_t row0, rows, t;
  };
  struct Piece {  // of `take`: part `part` of the ranks of groups [group, last), for some of their rows
    size_t group, last;
    int64_t row, rows, part;
  };
  // f(group, its first output, where that lies in the panel, rows' numbers in y, how many) for all that adapters add to a tile.
  template <class F>
  void each_stretch(int64_t column, int64_t row0, int64_t rows, F&& f) const;
  void take_piece(const Piece& piece, int64_t parts, const float* x, int64_t ldx, int64_t k, const float* norm, float eps);

  std::vector<Group> groups_;  // those of the same rows side by side
  std::vector<int32_t> rows_;  // of y, group after group
  std::vector<Piece> pieces_;
  int64_t sums_ = 0;           // floats of t_
  Buffer t_;
};

// y [rows][ldy] = x [rows][ldx] times the rows of a [n][k], in the order of `dots`.
void natural_linear(Element type, const void* a, int64_t n, int64_t k, const float* x, int64_t ldx, int64_t rows, float* y,
                    int64_t ldy);

}  // namespace dfk
