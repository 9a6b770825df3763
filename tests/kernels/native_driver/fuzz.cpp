// Random shapes against the law (law.h): integer formats to the last bit, floats within rounding. A case depends on its
// number and the seed alone, so one that fails can be run again by itself.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "best.h"
#include "cpu.h"
#include "law.h"
#include "modes.h"
#include "pool.h"
#include "scene.h"
#include "weights.h"

namespace driver {
namespace {

constexpr int64_t kKindCount = sizeof kKinds / sizeof *kKinds;

// What is wrong, or nothing.
using Verdict = std::string;

// Whether `got` is within `rounding` of `wanted`, as a share of the largest of a row.
bool near(const float* got, const float* wanted, int64_t rows, int64_t width, float rounding) {
  for (int64_t r = 0; r < rows; ++r, got += width, wanted += width) {
    float most = 1e-30f;
    for (int64_t i = 0; i < width; ++i) most = std::fabs(wanted[i]) > most ? std::fabs(wanted[i]) : most;
    for (int64_t i = 0; i < width; ++i) {
      if (!(std::fabs(got[i] - wanted[i]) <= rounding * most)) return false;
    }
  }
  return true;
}

std::string shape_of(const Weights& w, int64_t rows) {
  return std::string(w.kind.name) + " n " + std::to_string(w.n) + " k " + std::to_string(w.k) + " rows " + std::to_string(rows);
}

Verdict linear_case(Numbers& numbers) {
  const Kind& kind = kKinds[numbers.below(kKindCount)];
  const int64_t k = kind.whole_groups() ? 32 * numbers.between(1, 20) : numbers.between(1, 500);
  const int64_t n = numbers.often(3) ? 64 * numbers.between(1, 3) : numbers.between(1, 200);
  const int64_t rows = numbers.often(4) ? numbers.between(1, 140) : numbers.between(1, 14);
  const Weights w(kind, n, k, numbers, numbers.often(2));
  const int64_t ldx = k + numbers.below(3), ldy = n + numbers.below(3);
  const Array<float> x = bells(numbers, rows * ldx), y(rows * ldy), law(rows * n), got(rows * n);
  const Inputs in(dfk::act_kind(kind.format), x.data(), ldx, rows, k);
  const std::string shape = shape_of(w, rows);
  for (int64_t r = 0; in.acts.kind >= dfk::ActKind::row8 && r < rows; ++r) {
    if (const char* what = quantise_law(x.data() + r * ldx, in.acts, r)) return shape + ": " + what;
  }
  dfk::linear(w.linear(), in.acts, y.data(), ldy, false);
  linear_law(w, in.acts, law.data());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < n; ++c) {
      got[r * n + c] = y[r * ldy + c];
      if (w.bias.count() > 0) law[r * n + c] = law[r * n + c] + w.bias[c];
    }
  }
  const bool right = kind.exact() ? same(got.data(), law.data(), got.count()) : near(got.data(), law.data(), rows, n, 3e-5f);
  return right ? "" : shape + ": the product";
}

Verdict attention_case(Numbers& numbers) {
  const int64_t kv_heads = numbers.between(1, 3), group = numbers.between(1, 7), dim = 2 * numbers.between(1, 70);
  const auto type = static_cast<dfk::KvType>(numbers.below(3));
  SceneShape shape;
  shape.kv = {type, kv_heads, dim};
  shape.heads = kv_heads * group;
  shape.rotary = 2 * numbers.between(0, dim / 2);
  if (numbers.often(3)) shape.q_norm = shape.k_norm = dim;
  if (numbers.often(3)) shape.window = numbers.between(1, 200);
  if (numbers.often(3)) shape.softcap = 5.0f;
  for (int64_t i = numbers.between(1, 4); i > 0; --i) {
    const int64_t rows = numbers.often(4) ? numbers.between(1, 40) : numbers.between(1, 5);
    const int64_t cached = numbers.often(6) ? numbers.between(900, 2200) : numbers.below(200);
    shape.spans.push_back({rows, cached, numbers.often(4) ? 0 : rows, numbers.often(2), numbers.often(3)});
  }
  Scene scene(shape, numbers);
  scene.store();
  const Array<float> out(scene.rows() * scene.width()), law(out.count());
  scene.attend(out.data());
  attention_law(scene.attention(law.data()), law.data());
  // Products of bfloat16 pairs round the query and the weights to 8 bits first: a score of 50 by 0.1.
  const bool pairs = type != dfk::KvType::f32 && dfk::isa() == dfk::Isa::avx512;
  const float rounding = pairs ? 0.2f : 3e-5f;
  if (near(out.data(), law.data(), scene.rows() * shape.heads, dim, rounding)) return "";
  return "attention of K,V type " + std::to_string(static_cast<int>(type)) + " heads " + std::to_string(shape.heads) + "/" +
         std::to_string(kv_heads) + " dim " + std::to_string(dim);
}

Verdict gated_case(Numbers& numbers) {
  const Kind& kind = kKinds[numbers.below(kKindCount)];
  const int64_t k = 32 * numbers.between(1, 8), width = 32 * numbers.between(1, 4), rows = numbers.between(1, 9);
  const Weights w(kind, 2 * width, k, numbers);
  const Array<float> x = bells(numbers, rows * k), h(rows * width), both(rows * 2 * width), law(rows * width);
  const Inputs in(dfk::act_kind(kind.format), x.data(), k, rows, k), out(dfk::ActKind::f32, rows, width);
  dfk::linear_gated(w.linear(), in.acts, dfk::Activation::silu, h.data(), out.acts);
  linear_law(w, in.acts, both.data());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < width; ++i) {
      const float* const pair = both.data() + r * 2 * width + i / 32 * 64 + i % 32;
      law[r * width + i] = static_cast<float>(pair[0] / (1.0 + std::exp(-static_cast<double>(pair[0]))) * pair[32]);
    }
  }
  const bool right = near(static_cast<const float*>(out.acts.data), law.data(), rows, width, 1e-4f);
  return right ? "" : shape_of(w, rows) + ": gated";
}

Verdict head_case(Numbers& numbers) {
  const Kind& kind = kKinds[numbers.below(kKindCount)];
  const int64_t k = 32 * numbers.between(1, 5), n = numbers.between(1, 2200), rows = numbers.between(1, 70);
  const Weights w(kind, n, k, numbers);
  const Array<float> x = bells(numbers, rows * k), logits(rows * n);
  const Inputs in(dfk::act_kind(kind.format), x.data(), k, rows, k);
  const Array<dfk::RowStats> stats(rows);
  dfk::linear(w.linear(), in.acts, logits.data(), n, false);
  dfk::head_stats(w.linear(), in.acts, 0.0f, nullptr, 0, {}, true, 0, stats.data(), nullptr, nullptr);
  for (int64_t r = 0; r < rows; ++r) {
    const float* const row = logits.data() + r * n;
    int32_t best = 0;
    for (int64_t c = 0; c < n; ++c) best = row[c] > row[best] ? static_cast<int32_t>(c) : best;
    double sum = 0;
    for (int64_t c = 0; c < n; ++c) sum += std::exp(static_cast<double>(row[c]) - row[best]);
    const double norm = row[best] + std::log(sum);
    if (stats[r].token != best || stats[r].top != row[best]) return shape_of(w, rows) + ": the best id of row " + std::to_string(r);
    if (!(std::fabs(stats[r].norm - norm) <= 1e-5 * (1 + std::fabs(norm)))) return shape_of(w, rows) + ": logsumexp";
  }
  return "";
}

// Few different logits, so that ties reach over panels, offered in an order that no thread was made to keep: the list is
// that of all of them sorted, whichever panel came first.
Verdict best_case(Numbers& numbers) {
  const int64_t panels = numbers.between(1, 6), count = panels * dfk::kPanel, room = numbers.between(1, 8);
  const int64_t kinds = numbers.between(1, 4);
  const Array<float> logits(count), values(room);
  const Array<int32_t> ids(room);
  std::vector<int32_t> sorted;
  for (int64_t i = 0; i < count; ++i) {
    logits[i] = numbers.often(9) ? dfk::kNone : static_cast<float>(numbers.below(kinds));
    if (logits[i] > dfk::kNone) sorted.push_back(static_cast<int32_t>(i));
  }
  std::stable_sort(sorted.begin(), sorted.end(), [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  std::vector<int64_t> order(static_cast<size_t>(panels));
  for (int64_t i = 0; i < panels; ++i) order[static_cast<size_t>(i)] = i;
  for (int64_t i = panels - 1; i > 0; --i) std::swap(order[static_cast<size_t>(i)], order[static_cast<size_t>(numbers.below(i + 1))]);
  dfk::Best best;
  best.values = values.data();
  best.ids = ids.data();
  best.room = room;
  for (int64_t panel : order) {
    const float* const first = logits.data() + panel * dfk::kPanel;
    best.offer_panel(*std::max_element(first, first + dfk::kPanel), first, panel * dfk::kPanel);
  }
  best.finish(true);
  for (int64_t i = 0; i < room; ++i) {
    const bool there = i < static_cast<int64_t>(sorted.size());
    const int32_t wanted = there ? sorted[static_cast<size_t>(i)] : -1;
    if (ids[i] != wanted || values[i] != (there ? logits[wanted] : dfk::kNone)) return "place " + std::to_string(i) + " of the best";
  }
  return "";
}

}  // namespace

int fuzz(uint64_t seed, int64_t count) {
  constexpr Verdict (*kCases[])(Numbers&) = {linear_case, linear_case, attention_case, gated_case, head_case, best_case};
  int64_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) {
    Numbers numbers((seed + static_cast<uint64_t>(i)) * 0x9e3779b97f4a7c15u);
    dfk::set_thread_count(static_cast<int>(numbers.between(1, 3)));
    const Verdict verdict = kCases[numbers.below(sizeof kCases / sizeof *kCases)](numbers);
    if (verdict.empty()) continue;
    std::printf("seed %llu: %s\n", static_cast<unsigned long long>(seed + static_cast<uint64_t>(i)), verdict.c_str());
    ++wrong;
  }
  std::printf("fuzz: %lld of %lld cases are wrong\n", static_cast<long long>(wrong), static_cast<long long>(count));
  return wrong > 0 ? 1 : 0;
}

}  // namespace driver
