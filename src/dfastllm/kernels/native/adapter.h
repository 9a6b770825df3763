// An adapter as a forward pass uses it, and which rows of a step use which.
#pragma once

#include <cstdint>
#include <vector>

#include "low_rank.h"

namespace dfk {

// Takes the place of the base's embedding or head: [rows][hidden], or nothing.
struct Full {
  Element type = Element::f32;
  int64_t rows = 0;
  const void* data = nullptr;
};

struct Adapter {
  std::vector<std::vector<Delta>> sites;  // by the number of a Project or Gated in its forward
  std::vector<Delta> embed, head;         // one or none; `k` of the embedding's is the vocabulary
  Full embed_full, head_full;

  bool embeds() const { return !embed.empty() || embed_full.data != nullptr; }
};

// Row `id` of the embedding as this adapter has it, in place: x [hidden] is the base's row.
void adapt_embedding(const Adapter& adapter, int64_t id, int64_t hidden, float* x);

// Logits as this adapter has them: y [rows][vocab] are the base's, of hidden x [rows][k]. Those of ids that a head of its
// own has no row for stay.
void adapt_head(const Adapter& adapter, const float* x, int64_t k, int64_t rows, float* y, int64_t vocab);

// The rows of a step by adapter. table[number] is null for numbers that no row may have, and for 0: none.
class AdaptedRows {
 public:
  struct Group {
    const Adapter* adapter;
    int64_t first, count;  // of rows()
  };
  void set(const std::vector<const Adapter*>& table, const int32_t* numbers, int64_t rows);
  void clear() {
    groups_.clear();
    rows_.clear();
  }
  bool touches(int64_t site) const;
  // The work of a site's linear for these rows.
  void fill(int64_t site, LowRank& work) const;
  const std::vector<Group>& groups() const { return groups_; }
  const int32_t* rows() const { return rows_.data(); }

 private:
  std::vector<Group> groups_;
  std::vector<int32_t> rows_;
};

}  // namespace dfk
