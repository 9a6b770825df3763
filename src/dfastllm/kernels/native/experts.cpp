#include "experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

#include "pool.h"

namespace dfk {
namespace {

// Rows that are taken at once, a row counting once for each of its experts: so many outputs are held before they are summed.
constexpr int64_t kMostTaken = 8192;

constexpr int64_t kRouterExperts = 16, kRouterRows = 32;  // of a task
constexpr int64_t kTaskFloats = 1 << 14;                  // that are worth a task

// The highest of `count` values that is not taken yet, the lowest index of equal ones; it is taken. NaN is above all that
// follows it and below all that goes before.
int64_t take_highest(const double* values, uint8_t* open, int64_t count) {
  int64_t best = -1;
  for (int64_t i = 0; i < count; ++i) {
    if (open[i] && (best < 0 || values[i] > values[best])) best = i;
  }
  open[best] = 0;
  return best;
}

// open <- whether an expert is in one of the best groups.
void open_groups(const Router& router, const double* scores, uint8_t* open) {
  std::fill(open, open + router.experts, uint8_t{1});
  if (router.groups == router.groups_kept) return;
  const int64_t size = router.experts / router.groups;
  std::vector<double> best(static_cast<size_t>(router.groups));
  for (int64_t g = 0; g < router.groups; ++g) {
    const double* const own = scores + g * size;
    const int64_t first = take_highest(own, open + g * size, size);
    best[static_cast<size_t>(g)] = size == 1 ? own[first] : own[first] + own[take_highest(own, open + g * size, size)];
  }
  std::vector<uint8_t> left(static_cast<size_t>(router.groups), uint8_t{1});
  std::fill(open, open + router.experts, uint8_t{0});
  for (int64_t i = 0; i < router.groups_kept; ++i) {
    std::fill_n(open + take_highest(best.data(), left.data(), router.groups) * size, size, uint8_t{1});
  }
}

// Row `row` of prepared rows -> row `to` of others of the same kind and width.
void copy_row(const Acts& from, int64_t row, const Acts& out, int64_t to) {
  const int64_t bytes = from.stride * (from.kind == ActKind::f32 ? 4 : from.kind == ActKind::bf16 ? 2 : 1);
  std::memcpy(static_cast<char*>(out.data) + to * bytes, static_cast<const char*>(from.data) + row * bytes,
              static_cast<size_t>(bytes));
  if (from.scales == nullptr) return;
  const int64_t scales = from.kind == ActKind::row8 ? 1 : from.stride / 32;
  const int64_t sums = from.kind == ActKind::row8 ? 1 : from.stride / 16;
  std::memcpy(out.scales + to * scales, from.scales + row * scales, static_cast<size_t>(scales) * sizeof(float));
  std::memcpy(out.sums + to * sums, from.sums + row * sums, static_cast<size_t>(sums) * sizeof(int32_t));
}

Acts room(Buffer& memory, ActKind kind, int64_t rows, int64_t k) {
  return acts_at(memory.bytes(acts_bytes(kind, rows, k)), kind, rows, k);
}

// f(first, last) for stretches of `count` things of `size` floats each.
template <class F>
void in_stretches(int64_t count, int64_t size, F&& f) {
  const int64_t step = 1 + kTaskFloats / size;
  parallel((count + step - 1) / step, [&](int64_t task, int) { f(task * step, std::min(count, (task + 1) * step)); });
}

void require_turn(int64_t block, int64_t width) {
  if (block < 1 || (block & (block - 1)) != 0 || width % block != 0) {
    throw std::invalid_argument("a gate turns stretches of a power of two that divides its width.");
  }
}

void require_feed_forward(const FeedForward& block, int64_t hidden, int64_t width, ActKind in, ActKind middle) {
  const bool fits = block.gated.k == hidden && block.down.n == hidden && block.down.k == width &&
                    block.gated.n == (width + kPanel / 2 - 1) / (kPanel / 2) * kPanel;
  if (!fits) throw std::invalid_argument("the matrices of an expert do not fit each other.");
  if (act_kind(block.gated.format) != in || act_kind(block.down.format) != middle) {
    throw std::invalid_argument("the experts of a layer must take the same kind of rows.");
  }
}

}  // namespace

void choose_experts(const Router& router, const float* logits, int32_t* chosen, float* weights) {
  const size_t count = static_cast<size_t>(router.experts);
  std::vector<double> scores(count), ranks(count);
  std::vector<uint8_t> open(count);
  const bool sigmoid = router.bias != nullptr;
  double total = 0.0;
  const double top = *std::max_element(logits, logits + count);
  for (size_t e = 0; e < count; ++e) {
    const double logit = logits[e];
    scores[e] = sigmoid ? 1.0 / (1.0 + std::exp(-logit)) : std::exp(logit - top);
    ranks[e] = sigmoid ? scores[e] + router.bias[e] : logit;
    total += scores[e];
  }
  open_groups(router, ranks.data(), open.data());
  for (int64_t j = 0; j < router.top_k; ++j) {
    chosen[j] = static_cast<int32_t>(take_highest(ranks.data(), open.data(), router.experts));
  }
  std::sort(chosen, chosen + router.top_k);
  double sum = 0.0;
  for (int64_t j = 0; j < router.top_k; ++j) sum += scores[static_cast<size_t>(chosen[j])];
  // A sum of scores that is not a number says that the row is not finite.
  const double of = !std::isfinite(total) ? std::numeric_limits<double>::quiet_NaN()
                    : router.normalise    ? sum + 1e-20
                    : sigmoid             ? 1.0
                                          : total;
  for (int64_t j = 0; j < router.top_k; ++j) {
    weights[j] = static_cast<float>(scores[static_cast<size_t>(chosen[j])] / of * router.scale);
  }
}

void require_mixture(const Mixture& m) {
  const Router& r = m.router;
  const bool sound = r.experts >= 1 && r.groups >= 1 && r.groups_kept >= 1 && r.groups_kept <= r.groups &&
                     r.experts % r.groups == 0 && r.top_k >= 1 && r.top_k <= r.experts / r.groups * r.groups_kept;
  if (!sound || r.experts != static_cast<int64_t>(m.experts.size())) {
    throw std::invalid_argument("a router of " + std::to_string(r.experts) + " experts that chooses " + std::to_string(r.top_k) +
                                " in " + std::to_string(r.groups_kept) + " of " + std::to_string(r.groups) +
                                " groups, and experts: " + std::to_string(m.experts.size()) + ".");
  }
  require_turn(m.block, m.width);
  if (!m.shared.empty()) require_turn(m.shared_block, m.shared_width);
  if (m.shared.size() > 1) throw std::invalid_argument("a layer has one shared expert, or none.");
  for (const auto* side : {&m.experts, &m.shared}) {
    for (const FeedForward& block : *side) {
      const int64_t width = side == &m.experts ? m.width : m.shared_width;
      require_feed_forward(block, m.hidden(), width, act_kind((*side)[0].gated.format), act_kind((*side)[0].down.format));
    }
  }
}

size_t MixtureWork::bytes_held() const {
  size_t total = low_rank_.bytes_held();
  for (const Buffer* b : {&normed_memory_, &inputs_memory_, &taken_memory_, &middle_, &logits_, &product_, &parts_,
                          &shared_memory_, &floats_}) {
    total += b->size();
  }
  return total;
}

void MixtureWork::run(const Mixture& m, const float* x, int64_t ldx, int64_t rows, const float* norm, float eps,
                      const AdaptedRows& adapted, int64_t site, float* out, bool accumulate) {
  const int64_t hidden = m.hidden(), turn = std::max<int64_t>(1, kMostTaken / m.router.top_k);
  adapter_.assign(static_cast<size_t>(rows), -1);
  for (size_t g = 0; g < adapted.groups().size(); ++g) {
    const AdaptedRows::Group& group = adapted.groups()[g];
    for (int64_t i = 0; i < group.count; ++i) {
      adapter_[static_cast<size_t>(adapted.rows()[group.first + i])] = static_cast<int32_t>(g);
    }
  }
  normed_ = room(normed_memory_, ActKind::f32, rows, hidden);
  prepare(x, ldx, norm, eps, normed_);
  route(m, adapted, site);
  run_shared(m, x, ldx, norm, eps, adapted, site);
  const ActKind kind = act_kind(m.experts[0].gated.format);
  inputs_ = kind == ActKind::f32 ? normed_ : room(inputs_memory_, kind, rows, hidden);
  if (kind != ActKind::f32) prepare(x, ldx, norm, eps, inputs_);
  for (int64_t row0 = 0; row0 < rows; row0 += turn) {
    const int64_t some = std::min(turn, rows - row0);
    group(m, row0, some);
    take_inputs();
    run_experts(m, adapted, site);
    collect(m, row0, some, out, accumulate);
  }
}

void MixtureWork::route(const Mixture& m, const AdaptedRows& adapted, int64_t site) {
  const Router& router = m.router;
  const LinearOps& ops = linear_ops();
  const int64_t rows = normed_.rows, k = normed_.k, experts = router.experts;
  const float* const x = static_cast<const float*>(normed_.data);
  float* const logits = logits_.floats(static_cast<size_t>(rows * experts));
  const int64_t across = (experts + kRouterExperts - 1) / kRouterExperts;
  parallel(across * ((rows + kRouterRows - 1) / kRouterRows), [&](int64_t task, int) {
    const int64_t e = task % across * kRouterExperts, row = task / across * kRouterRows;
    ops.dots(router.type, static_cast<const char*>(router.weight) + e * k * element_bytes(router.type), k,
             std::min(kRouterExperts, experts - e), x + row * normed_.stride, normed_.stride, nullptr,
             std::min(kRouterRows, rows - row), 1.0f, logits + row * experts + e, experts);
  });
  if (adapted.touches(site)) {
    adapted.fill(site, low_rank_);
    low_rank_.take(x, normed_.stride, k, nullptr, 0.0f);
    low_rank_.apply(logits, experts);
  }
  chosen_.resize(static_cast<size_t>(rows * router.top_k));
  weights_.resize(chosen_.size());
  in_stretches(rows, 16 * experts, [&](int64_t row, int64_t end) {  // an exponential is worth many sums
    for (; row < end; ++row) {
      choose_experts(router, logits + row * experts, chosen_.data() + row * router.top_k, weights_.data() + row * router.top_k);
    }
  });
}

void MixtureWork::run_shared(const Mixture& m, const float* x, int64_t ldx, const float* norm, float eps,
                             const AdaptedRows& adapted, int64_t site) {
  shared_ = nullptr;
  if (m.shared.empty()) return;
  const FeedForward& block = m.shared[0];
  const int64_t rows = normed_.rows, hidden = m.hidden(), up = site + m.sites() - 2, down = up + 1;
  const float* const floats = static_cast<const float*>(normed_.data);
  float* const out = shared_memory_.floats(static_cast<size_t>(rows * hidden));
  inputs_ = room(inputs_memory_, act_kind(block.gated.format), rows, hidden);
  prepare(x, ldx, norm, eps, inputs_);
  const Acts middle = room(middle_, act_kind(block.down.format), rows, m.shared_width);
  const bool touched = adapted.touches(up) || adapted.touches(down);
  float* const product = room_between(middle, m.shared_block, touched);
  const auto changes = [&](int64_t of, const float* from, int64_t stride, int64_t k) -> const LowRank* {
    if (!adapted.touches(of)) return nullptr;
    adapted.fill(of, low_rank_);
    low_rank_.take(from, stride, k, nullptr, 0.0f);
    return &low_rank_;
  };
  const Adapted upper{changes(up, floats, normed_.stride, hidden)};
  linear_gated(block.gated, inputs_, Activation::silu, product, middle, m.shared_block, upper, touched);
  linear(block.down, middle, out, hidden, false, {changes(down, product, m.shared_width, m.shared_width)});
  shared_ = out;
}

// Memory for products of gate and up before they are prepared, where they go through memory.
float* MixtureWork::room_between(const Acts& middle, int64_t block, bool touched) {
  return touched || block > 1 || middle.kind == ActKind::row8 ? product_.floats(static_cast<size_t>(middle.rows * middle.k)) : nullptr;
}

// The rows [row0, row0 + rows) by expert.
void MixtureWork::group(const Mixture& m, int64_t row0, int64_t rows) {
  const int64_t experts = m.router.experts, top_k = m.router.top_k;
  const int32_t* const chosen = chosen_.data() + row0 * top_k;
  first_.assign(static_cast<size_t>(experts + 1), 0);
  for (int64_t i = 0; i < rows * top_k; ++i) ++first_[static_cast<size_t>(chosen[i] + 1)];
  std::partial_sum(first_.begin(), first_.end(), first_.begin());
  std::vector<int64_t> next(first_.begin(), first_.end() - 1);
  row_.resize(static_cast<size_t>(rows * top_k));
  place_.resize(row_.size());
  for (int64_t i = 0; i < rows * top_k; ++i) {
    const int64_t at = next[static_cast<size_t>(chosen[i])]++;
    row_[static_cast<size_t>(at)] = static_cast<int32_t>(row0 + i / top_k);
    place_[static_cast<size_t>(i)] = static_cast<int32_t>(at);
  }
  busy_.clear();
  const auto count = [&](int32_t e) { return first_[static_cast<size_t>(e + 1)] - first_[static_cast<size_t>(e)]; };
  for (int32_t e = 0; e < experts; ++e) {
    if (count(e) > 0) busy_.push_back(e);
  }
  // The pool's last tasks are the smallest stretches: what takes longest is cut finest.
  std::stable_sort(busy_.begin(), busy_.end(), [&](int32_t a, int32_t b) { return count(a) < count(b); });
}

void MixtureWork::take_inputs() {
  const int64_t taken = static_cast<int64_t>(row_.size());
  taken_ = room(taken_memory_, inputs_.kind, taken, inputs_.k);
  in_stretches(taken, inputs_.stride / 4, [&](int64_t i, int64_t end) {
    for (; i < end; ++i) copy_row(inputs_, row_[static_cast<size_t>(i)], taken_, i);
  });
}

void MixtureWork::run_experts(const Mixture& m, const AdaptedRows& adapted, int64_t site) {
  const int64_t taken = taken_.rows, hidden = m.hidden();
  const auto share_out = [&](Linear FeedForward::*which) {
    shares_.clear();
    for (const int32_t e : busy_) {
      const int64_t first = first_[static_cast<size_t>(e)];
      shares_.push_back({&(m.experts[static_cast<size_t>(e)].*which), first, first_[static_cast<size_t>(e + 1)] - first});
    }
    return static_cast<int64_t>(shares_.size());
  };
  bool touched = false;
  for (const int32_t e : busy_) touched = touched || adapted.touches(site + 1 + 2 * e) || adapted.touches(site + 2 + 2 * e);
  const Acts middle = room(middle_, act_kind(m.experts[0].down.format), taken, m.width);
  float* const product = room_between(middle, m.block, touched);
  float* const parts = parts_.floats(static_cast<size_t>(taken * hidden));
  const int64_t busy = share_out(&FeedForward::gated);
  const LowRank* work = nullptr;
  if (touched) {
    float* const floats = floats_.floats(static_cast<size_t>(taken * hidden));
    for (int64_t i = 0; i < taken; ++i) {
      const float* const from = static_cast<const float*>(normed_.data) + row_[static_cast<size_t>(i)] * normed_.stride;
      std::copy(from, from + hidden, floats + i * hidden);
    }
    work = changes(m, adapted, site, 0, floats, hidden);
  }
  linear_gated(shares_.data(), busy, taken_, Activation::silu, product, middle, m.block, {work}, touched);
  share_out(&FeedForward::down);
  if (touched) work = changes(m, adapted, site, 1, product, m.width);
  linear(shares_.data(), busy, middle, parts, hidden, false, {work});
}

const LowRank* MixtureWork::changes(const Mixture& m, const AdaptedRows& adapted, int64_t site, int which, const float* x,
                                    int64_t k) {
  low_rank_.clear();
  std::vector<int32_t> some;
  for (int64_t e = 0; e < m.router.experts; ++e) {
    for (size_t g = 0; g < adapted.groups().size(); ++g) {
      const std::vector<Delta>& deltas = adapted.groups()[g].adapter->sites[static_cast<size_t>(site + 1 + 2 * e + which)];
      if (deltas.empty()) continue;
      some.clear();
      for (int64_t i = first_[static_cast<size_t>(e)]; i < first_[static_cast<size_t>(e + 1)]; ++i) {
        const int32_t row = row_[static_cast<size_t>(i)];
        if (adapter_[static_cast<size_t>(row)] == static_cast<int32_t>(g)) some.push_back(static_cast<int32_t>(i));
      }
      if (!some.empty()) low_rank_.add(deltas, some.data(), static_cast<int64_t>(some.size()));
    }
  }
  if (low_rank_.empty()) return nullptr;
  low_rank_.take(x, k, k, nullptr, 0.0f);
  return &low_rank_;
}

// Each row's sum, over its experts in ascending order, then the shared one.
void MixtureWork::collect(const Mixture& m, int64_t row0, int64_t rows, float* out, bool accumulate) {
  const int64_t hidden = m.hidden(), top_k = m.router.top_k;
  const float* const parts = parts_.floats(0);
  constexpr int64_t columns = 256;
  in_stretches(rows, hidden * top_k, [&](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      for (int64_t c0 = 0; c0 < hidden; c0 += columns) {
        const int64_t count = std::min(columns, hidden - c0);
        float sums[columns] = {};
        for (int64_t j = 0; j < top_k; ++j) {
          const size_t at = static_cast<size_t>(row * top_k + j);
          const float weight = weights_[static_cast<size_t>(row0 * top_k) + at];
          const float* const part = parts + place_[at] * hidden + c0;
          for (int64_t c = 0; c < count; ++c) sums[c] += weight * part[c];
        }
        const int64_t to = (row0 + row) * hidden + c0;
        for (int64_t c = 0; shared_ != nullptr && c < count; ++c) sums[c] += shared_[to + c];
        for (int64_t c = 0; c < count; ++c) out[to + c] = accumulate ? out[to + c] + sums[c] : sums[c];
      }
    }
  });
}

}  // namespace dfk
