// A mixture of experts: h <- sum over a row's experts of weight * down(silu(gate) * up), plus the shared expert's.
//
// A row's experts follow from the row alone, and its sum runs over them in ascending order, so its bits depend on no other
// row. The rows are grouped by expert; the products of all experts that have rows are one piece of work for the pool.
#pragma once

#include <cstdint>
#include <vector>

#include "adapter.h"
#include "linear.h"
#include "low_rank.h"
#include "scratch.h"

namespace dfk {

// Which experts a row goes to, and with which weights. bias null: the `top_k` of a softmax over all experts. Else: scores
// are sigmoids of their own; the best by score + bias inside the `groups_kept` best groups (a group counts the sum of its
// two best), their weights being the scores without the bias. Equal ones: the lowest number. normalise: the chosen weights
// sum to 1. Then they are multiplied with `scale`.
struct Router {
  Element type;
  const void* weight;  // [experts][hidden]
  const float* bias;   // [experts], or null
  int64_t experts, top_k, groups, groups_kept;
  bool normalise;
  float scale;
};

// logits [experts] of a row -> its experts, ascending, and their weights, [top_k] each. The weights of a row that is not
// finite are NaN.
void choose_experts(const Router& router, const float* logits, int32_t* chosen, float* weights);

struct FeedForward {
  Linear gated;  // 32 gate, 32 up channels per panel
  Linear down;
};

struct Mixture {
  Router router;
  int64_t width = 0;                  // of an expert between gate and down
  int64_t block = 1;                  // above 1: those are turned in stretches of so many before down
  std::vector<FeedForward> experts;   // of one kind of inputs, and one kind of inputs of down
  std::vector<FeedForward> shared;    // one or none
  int64_t shared_width = 0, shared_block = 1;

  int64_t hidden() const { return experts[0].down.n; }
  // Linears that an adapter may change: the router, then gate with up and down of each expert, then of the shared one.
  int64_t sites() const { return 1 + 2 * static_cast<int64_t>(experts.size() + shared.size()); }
};

// Throws std::invalid_argument for parts that do not fit each other.
void require_mixture(const Mixture& mixture);

// Runs mixtures; holds memory between them.
class MixtureWork {
 public:
  // x [rows][ldx] -> out [rows][hidden], or out += where `accumulate`, RMSNorm first if norm is not null. adapted: what
  // changes the linears from site number `site` on.
  void run(const Mixture& m, const float* x, int64_t ldx, int64_t rows, const float* norm, float eps,
           const AdaptedRows& adapted, int64_t site, float* out, bool accumulate);

  size_t bytes_held() const;

 private:
  void route(const Mixture& m, const AdaptedRows& adapted, int64_t site);
  void run_shared(const Mixture& m, const float* x, int64_t ldx, const float* norm, float eps, const AdaptedRows& adapted,
                  int64_t site);
  float* room_between(const Acts& middle, int64_t block, bool touched);
  void group(const Mixture& m, int64_t row0, int64_t rows);
  void take_inputs();
  void run_experts(const Mixture& m, const AdaptedRows& adapted, int64_t site);
  void collect(const Mixture& m, int64_t row0, int64_t rows, float* out, bool accumulate);
  // What the rows' adapters change of each expert's gate with up (`which` 0) or down (1), of inputs x [taken][k]; null:
  // nothing.
  const LowRank* changes(const Mixture& m, const AdaptedRows& adapted, int64_t site, int which, const float* x, int64_t k);

  Acts normed_{};                 // all rows as floats, for the router and adapters
  Acts inputs_{};                 // all rows as the experts take them
  Acts taken_{};                  // a row for each of its experts
  const float* shared_ = nullptr; // what the shared expert gives, [rows][hidden], or null
  std::vector<int32_t> chosen_;   // [rows][top_k]
  std::vector<float> weights_;
  std::vector<int32_t> row_;      // [taken]: which row it is
  std::vector<int32_t> place_;    // [rows of a turn][top_k]: where it lies among the taken ones
  std::vector<int64_t> first_;    // [experts + 1]: where an expert's rows begin among the taken ones
  std::vector<int32_t> busy_;     // experts that have rows, those with few first
  std::vector<Share> shares_;
  std::vector<int32_t> adapter_;  // [rows]: the number of its group among the adapted rows, -1: none
  LowRank low_rank_;
  Buffer normed_memory_, inputs_memory_, taken_memory_, middle_, logits_, product_, parts_, shared_memory_, floats_;
};

}  // namespace dfk
