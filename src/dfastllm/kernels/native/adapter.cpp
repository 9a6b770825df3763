#include "adapter.h"

#include <algorithm>
#include <numeric>

#include "pool.h"

namespace dfk {

void AdaptedRows::set(const std::vector<const Adapter*>& table, const int32_t* numbers, int64_t rows) {
  clear();
  for (int64_t row = 0; row < rows; ++row) {
    if (numbers[row] > 0) rows_.push_back(static_cast<int32_t>(row));
  }
  std::stable_sort(rows_.begin(), rows_.end(), [&](int32_t a, int32_t b) { return numbers[a] < numbers[b]; });
  for (size_t i = 0; i < rows_.size(); ++i) {
    const int32_t number = numbers[rows_[i]];
    if (i == 0 || numbers[rows_[i - 1]] != number) {
      groups_.push_back({table[static_cast<size_t>(number)], static_cast<int64_t>(i), 0});
    }
    ++groups_.back().count;
  }
}

bool AdaptedRows::touches(int64_t site) const {
  return std::any_of(groups_.begin(), groups_.end(),
                     [&](const Group& g) { return !g.adapter->sites[static_cast<size_t>(site)].empty(); });
}

void AdaptedRows::fill(int64_t site, LowRank& work) const {
  work.clear();
  for (const Group& g : groups_) {
    const std::vector<Delta>& deltas = g.adapter->sites[static_cast<size_t>(site)];
    if (!deltas.empty()) work.add(deltas, rows_.data() + g.first, g.count);
  }
}

void adapt_embedding(const Adapter& adapter, int64_t id, int64_t hidden, float* x) {
  const LinearOps& ops = linear_ops();
  const Full& full = adapter.embed_full;
  if (full.data != nullptr && id < full.rows) {
    ops.widen(full.type, static_cast<const char*>(full.data) + id * hidden * element_bytes(full.type), hidden, 1, x);
  }
  for (const Delta& d : adapter.embed) {
    const int32_t row = 0;
    std::vector<float> t(static_cast<size_t>(d.rank));
    const char* const column = static_cast<const char*>(d.a) + id * element_bytes(d.type);
    if (d.rank > 0 && id < d.k) ops.widen(d.type, column, d.rank, d.k, t.data());
    for (float& value : t) value *= d.scale;
    ops.spread({&d, 0, hidden, t.data(), &row, 1, 0, x, hidden});
  }
}

void adapt_head(const Adapter& adapter, const float* x, int64_t k, int64_t rows, float* y, int64_t vocab) {
  const Full& full = adapter.head_full;
  if (full.data != nullptr) natural_linear(full.type, full.data, full.rows, k, x, k, rows, y, vocab);
  if (!adapter.head.empty()) {
    std::vector<int32_t> all(static_cast<size_t>(rows));
    std::iota(all.begin(), all.end(), 0);
    LowRank work;
    work.add(adapter.head, all.data(), rows);
    work.take(x, k, k, nullptr, 0.0f);
    work.apply(y, vocab);
  }
}

}  // namespace dfk
