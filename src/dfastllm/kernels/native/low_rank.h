// What adapters add to the rows of a linear y = W x + bias, each row its own adapter's or nothing:
//
//   y <- factor * (y + scale * B (A x)) + shift        dfastllm/lora/adapter.py
//
// A row's result depends on its row of x and y and on its adapter alone: never on other rows or adapters, nor on threads.
// Ranks are not padded, and the matrices are read as they lie in memory.
#pragma once

#include <cstdint>
#include <vector>

#include "linear.h"
#include "scratch.h"

namespace dfk {

enum class Element : int { f32 = 0, bf16 = 1, f16 = 2 };

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
  const void* b;        // [rank][n]
  float scale;
  const float* factor;  // [n] or null: 1
  const float* shift;   // [n] or null: 0
  std::vector<Place> places;
};

// Whether a delta's inputs are k values and its outputs lie in y's `columns`.
bool fits(const Delta& delta, int64_t k, int64_t columns);

// Columns and rows of a task: its sums (16 KB) stay in a core's L1 cache.
constexpr int64_t kSpreadColumns = 512, kSpreadRows = 8;

// Some columns of some rows: outputs [first, first + count) of a matrix, count at most kSpreadColumns.
struct Spread {
  const Delta* delta;
  int64_t first, count, column, stride;  // as of a Place
  const float* t;                        // [rows][rank], what A x came to, scaled
  const int32_t* row;                    // [rows] of y
  int64_t rows;                          // at most kSpreadRows
  float* y;
  int64_t ldy;
};

// The work of one linear: first all its adapters' rows (`add`), then their inputs (`gather`), and when y is there `apply`.
class LowRank {
 public:
  void clear();
  bool empty() const { return rows_.empty(); }
  // Rows of y, and of the inputs, that these deltas are for. All must outlive `apply`.
  void add(const std::vector<Delta>& deltas, const int32_t* rows, int64_t count);
  // The rows' inputs out of x [..][ldx], k values each, with RMSNorm first if norm is not null.
  void gather(const float* x, int64_t ldx, int64_t k, const float* norm, float eps);
  void apply(float* y, int64_t ldy);

  size_t bytes_held() const { return x_.size() + t_.size(); }

 private:
  struct Piece {  // of the first half: A x for some rows of A and of x
    const Delta* delta;
    int64_t rank0, ranks, row0, rows, t;
  };
  struct Group {
    const Delta* delta;
    int64_t row0, rows, t;
  };
  std::vector<Group> groups_;
  std::vector<int32_t> rows_;  // of y, group after group
  std::vector<Piece> pieces_;
  std::vector<Spread> spreads_;
  int64_t sums_ = 0;           // floats of t_
  Acts in_{};
  Buffer x_, t_;
};

// y [rows][ldy] = x [rows][ldx] times the rows of a [n][k], in the order of `dots`.
void natural_linear(Element type, const void* a, int64_t n, int64_t k, const float* x, int64_t ldx, int64_t rows, float* y,
                    int64_t ldy);

}  // namespace dfk
