// The golden rows: every kernel on fixed inputs, one line of JSON a result.
#include "modes.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "linear_head.h"
#include "low_rank.h"
#include "pool.h"
#include "scene.h"
#include "weights.h"

namespace driver {
namespace {

using dfk::ActKind;
using dfk::KvType;

constexpr int64_t kMostRows = 32;

// Prints results; remembers what did not agree.
class Report {
 public:
  // Floats: a hash of their bits (any NaN as one) and five of them.
  void floats(const std::string& name, const float* x, int64_t count) {
    uint64_t hash = hash_of(nullptr, 0);
    for (int64_t i = 0; i < count; ++i) {
      uint32_t raw = 0x7fc00000;
      if (x[i] == x[i]) std::memcpy(&raw, x + i, sizeof raw);
      hash = hash_of(&raw, sizeof raw, hash);
    }
    std::printf("{\"name\": \"%s\", \"hash\": \"%016llx\", \"values\": [", name.c_str(), static_cast<unsigned long long>(hash));
    float most = 0;
    for (int64_t i = 0; i < count; ++i) most = x[i] > most ? x[i] : -x[i] > most ? -x[i] : most;
    for (int64_t i = 0; i < 5; ++i) {
      const float value = x[i * (count - 1) / 4];
      if (value == value && value - value == 0) std::printf("%s%.9g", i > 0 ? ", " : "", static_cast<double>(value));
      else std::printf("%snull", i > 0 ? ", " : "");
    }
    std::printf("], \"most\": %.9g}\n", most - most == 0 ? static_cast<double>(most) : 0.0);
  }

  void bytes(const std::string& name, const void* x, int64_t count) {
    std::printf("{\"name\": \"%s\", \"hash\": \"%016llx\"}\n", name.c_str(), static_cast<unsigned long long>(hash_of(x, count)));
  }

  void require(bool right, const std::string& what) {
    if (right) return;
    std::printf("{\"wrong\": \"%s\"}\n", what.c_str());
    ++wrong_;
  }

  int wrong() const { return wrong_; }

 private:
  int wrong_ = 0;
};

// The widths at which linears run: an odd number of panels, the last one not whole; inputs that end inside a slice.
int64_t inputs_of(const Kind& kind) { return kind.whole_groups() ? 416 : 327; }

void packing(Report& report) {
  for (const Kind& kind : kKinds) {
    Numbers numbers(1);
    const Weights w(kind, 130, inputs_of(kind), numbers);
    report.bytes(std::string("pack ") + kind.name, w.data.data(), w.data.bytes());
    report.bytes(std::string("pack scales ") + kind.name, w.panel_scales.data(), w.panel_scales.bytes());
    const int64_t ids[] = {0, 63, 64, 129, 77};
    const Array<float> rows(5 * w.k);
    dfk::weight_rows(w.linear(), ids, 5, rows.data());
    report.floats(std::string("weight_rows ") + kind.name, rows.data(), rows.count());
  }
}

// Rows of inputs, some of them awkward: zero, tiny, large, not finite.
Array<float> awkward(Numbers& numbers, int64_t rows, int64_t k) {
  Array<float> x = bells(numbers, rows * k);
  for (int64_t i = 0; i < k; ++i) {
    x[1 * k + i] = 0.0f;
    x[2 * k + i] *= 0x1p-120f;
    x[3 * k + i] *= 0x1p90f;
  }
  x[4 * k + 5] = INFINITY;
  x[5 * k + 70] = std::nanf("");
  return x;
}

void preparing(Report& report) {
  const char* const names[] = {"f32", "bf16", "row8", "group8"};
  for (int kind = 0; kind < 4; ++kind) {
    for (const int64_t k : {327, 416}) {
      for (const bool normed : {false, true}) {
        Numbers numbers(2);
        const Array<float> x = awkward(numbers, 9, k), norm = bells(numbers, k);
        const Inputs in(static_cast<ActKind>(kind), x.data(), k, 9, k, normed ? norm.data() : nullptr, 1e-5f);
        const std::string name = std::string("prepare ") + names[kind] + (normed ? " norm " : " ") + std::to_string(k);
        const int64_t cells = 9 * in.acts.stride;
        if (kind == 0) report.floats(name, static_cast<const float*>(in.acts.data), cells);
        else report.bytes(name, in.acts.data, cells * (kind == 1 ? 2 : 1));
        if (kind < 2) continue;
        report.floats(name + " scales", in.acts.scales, kind == 2 ? 9 : cells / 32);
        report.bytes(name + " sums", in.acts.sums, 4 * (kind == 2 ? 9 : cells / 16));
      }
    }
  }
}

void linears(Report& report) {
  for (const Kind& kind : kKinds) {
    Numbers numbers(3);
    const int64_t k = inputs_of(kind), n = 130;
    const Weights w(kind, n, k, numbers, true);
    dfk::Linear bare = w.linear();
    bare.bias = nullptr;
    const Array<float> x = bells(numbers, kMostRows * k);
    const Array<float> all(kMostRows * n), more = bells(numbers, kMostRows * n);
    const ActKind act = dfk::act_kind(kind.format);
    const Inputs in(act, x.data(), k, kMostRows, k);
    dfk::linear(bare, in.acts, all.data(), n, false);
    report.floats(std::string("linear ") + kind.name, all.data(), all.count());
    for (int64_t rows = 1; rows < kMostRows; ++rows) {
      const Inputs fewer(act, x.data(), k, rows, k);
      const Array<float> y(rows * n);
      dfk::linear(bare, fewer.acts, y.data(), n, false);
      report.require(same(y.data(), all.data(), y.count()), std::string(kind.name) + ", rows " + std::to_string(rows));
    }
    dfk::linear(w.linear(), in.acts, more.data(), n, true);
    report.floats(std::string("linear onto ") + kind.name, more.data(), more.count());
  }
}

// Rows through the Hadamard transform, and a gate's products on their way to the next linear.
void turned(Report& report) {
  for (const int64_t block : {2, 8, 16, 32, 128, 256}) {
    Numbers numbers(7);
    const int64_t k = block == 8 ? 88 : 768, rows = 5;
    const Array<float> x = bells(numbers, rows * k);
    for (const ActKind kind : {ActKind::f32, ActKind::row8, ActKind::group8}) {
      const Inputs out(kind, rows, k);
      dfk::prepare_turned(x.data(), k, block, out.acts);
      const std::string name = "prepare turned " + std::to_string(static_cast<int>(kind)) + " " + std::to_string(block);
      const int64_t cells = rows * out.acts.stride;
      if (kind == ActKind::f32) report.floats(name, static_cast<const float*>(out.acts.data), cells);
      else report.bytes(name, out.acts.data, cells);
    }
  }
  Numbers numbers(8);
  const int64_t k = 128, width = 96, rows = 7;
  const Weights w(kKinds[2], 2 * width, k, numbers);
  const Array<float> x = bells(numbers, rows * k), h(rows * width);
  const Inputs in(dfk::act_kind(kKinds[2].format), x.data(), k, rows, k), out(ActKind::row8, rows, width);
  dfk::linear_gated(w.linear(), in.acts, dfk::Activation::silu, h.data(), out.acts, 32);
  report.bytes("gated turned", out.acts.data, rows * out.acts.stride);
  report.floats("gated turned scales", out.acts.scales, rows);
}

void gates(Report& report) {
  for (const Kind& kind : {kKinds[2], kKinds[3], kKinds[4]}) {
    for (int act = 0; act < 2; ++act) {
      for (int to = 0; to < 4; ++to) {
        Numbers numbers(4);
        const int64_t k = inputs_of(kind), width = 96, rows = 7;
        const Weights w(kind, 2 * width, k, numbers, act == 1);
        const Array<float> x = bells(numbers, rows * k), h(rows * width);
        const Inputs in(dfk::act_kind(kind.format), x.data(), k, rows, k), out(static_cast<ActKind>(to), rows, width);
        dfk::linear_gated(w.linear(), in.acts, static_cast<dfk::Activation>(act), h.data(), out.acts);
        const std::string name = std::string("gated ") + kind.name + (act ? " gelu to " : " silu to ") + std::to_string(to);
        const int64_t cells = rows * out.acts.stride;
        if (to == 0) report.floats(name, static_cast<const float*>(out.acts.data), cells);
        else report.bytes(name, out.acts.data, cells * (to == 1 ? 2 : 1));
        if (to >= 2) report.floats(name + " scales", out.acts.scales, to == 2 ? rows : cells / 32);
      }
    }
  }
}

void caps(Report& report) {
  Numbers numbers(5);
  const Array<float> x = bells(numbers, 1001, 20.0f);
  x[17] = INFINITY;
  dfk::softcap(x.data(), x.count(), 30.0f);
  report.floats("softcap", x.data(), x.count());
}

// Statistics of rows of logits, as floats and as ids.
void head(Report& report, const Kind& kind, float cap, bool barred) {
  Numbers numbers(6);
  const int64_t n = 1500, k = 128, rows = 5, topk = 6, words = (n + 63) / 64;
  const Weights w(kind, n, k, numbers);
  const Array<float> x = bells(numbers, rows * k);
  x[3 * k] = INFINITY;
  const Inputs in(dfk::act_kind(kind.format), x.data(), k, rows, k);
  const int32_t ban[] = {1499, 3, 64};
  const Array<uint64_t> sets(2 * words);
  for (int64_t i = 0; i < sets.count(); ++i) sets[i] = numbers.next() | numbers.next();
  const int32_t of_row[] = {0, -1, 1, 1, 0};
  const Array<dfk::HeadChoice> choices(rows);
  const dfk::Barred bars = barred ? dfk::Barred{sets.data(), of_row, choices.data()} : dfk::Barred{};
  const Array<dfk::RowStats> stats(rows);
  const Array<float> values(rows * topk);
  const Array<int32_t> ids(rows * topk);
  dfk::head_stats(w.linear(), in.acts, cap, ban, 3, bars, true, topk, stats.data(), values.data(), ids.data());
  Array<float> floats(5 * rows);
  Array<int32_t> whole(3 * rows);
  for (int64_t r = 0; r < rows; ++r) {
    const float row[] = {stats[r].top, stats[r].second, stats[r].norm, stats[r].entropy, choices[r].logit};
    for (int64_t i = 0; i < 5; ++i) floats[5 * r + i] = row[i];
    whole[3 * r] = stats[r].token;
    whole[3 * r + 1] = stats[r].finite;
    whole[3 * r + 2] = choices[r].token;
  }
  const std::string name = std::string("head ") + kind.name + (cap > 0 ? " capped" : "") + (barred ? " barred" : "");
  report.floats(name, floats.data(), floats.count());
  report.bytes(name + " ids", whole.data(), whole.bytes());
  report.floats(name + " best", values.data(), values.count());
  report.bytes(name + " best ids", ids.data(), ids.bytes());
}

void heads(Report& report) {
  for (const Kind& kind : {kKinds[0], kKinds[1], kKinds[3]}) head(report, kind, 0.0f, false);
  head(report, kKinds[3], 30.0f, true);
  head(report, kKinds[4], 0.0f, true);
}

// B [rank][n] as an adapter holds it.
Array<char> in_units(const Array<char>& b, int64_t rank, int64_t n, int64_t bytes) {
  Array<char> units(dfk::round_up(n, dfk::kUnit) * rank * bytes);
  std::fill(units.data(), units.data() + units.count(), '\0');
  for (int64_t j = 0; j < rank; ++j) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t to = (i / dfk::kUnit * rank + j) * dfk::kUnit + i % dfk::kUnit;
      std::memcpy(units.data() + to * bytes, b.data() + (j * n + i) * bytes, static_cast<size_t>(bytes));
    }
  }
  return units;
}

void adapters(Report& report) {
  const char* const names[] = {"f32", "bf16", "f16"};
  for (int type = 0; type < 3; ++type) {
    Numbers numbers(7);
    const int64_t rank = 5, k = 75, n = 600, rows = 9;
    const int64_t bytes = dfk::element_bytes(static_cast<dfk::Element>(type));
    const Array<char> a(rank * k * bytes), b(rank * n * bytes);
    for (const Array<char>* side : {&a, &b}) {
      for (int64_t i = 0; i < side->count() / bytes; ++i) {
        const float value = numbers.bell();
        uint32_t raw;
        std::memcpy(&raw, &value, sizeof raw);
        const uint16_t narrow = type == 1 ? static_cast<uint16_t>(raw >> 16) : half_scale(numbers);
        if (type == 0) std::memcpy(side->data() + 4 * i, &raw, 4);
        else std::memcpy(side->data() + 2 * i, &narrow, 2);
      }
    }
    const Array<char> units = in_units(b, rank, n, bytes);
    const Array<float> factor = bells(numbers, n), shift = bells(numbers, n);
    const std::vector<dfk::Delta> deltas = {{static_cast<dfk::Element>(type), rank, k, n, a.data(), units.data(), 0.5f, factor.data(),
                                             shift.data(), {{0, n, 0, 32}}}};
    const Array<float> x = bells(numbers, rows * k), y = bells(numbers, rows * n), plain(rows * rank);
    const int32_t which[] = {8, 0, 3, 4, 5};
    dfk::LowRank work;
    work.clear();
    work.add(deltas, which, 5);
    work.take(x.data(), k, k, nullptr, 0.0f);
    work.apply(y.data(), n);
    report.floats(std::string("low rank ") + names[type], y.data(), y.count());
    dfk::natural_linear(static_cast<dfk::Element>(type), a.data(), rank, k, x.data(), k, rows, plain.data(), rank);
    report.floats(std::string("natural ") + names[type], plain.data(), plain.count());
  }
}

void attend(Report& report, const std::string& name, const SceneShape& shape) {
  Numbers numbers(8);
  Scene scene(shape, numbers);
  scene.store();
  report.floats("rope " + name, scene.qkv.data(), scene.qkv.count());
  report.bytes("store " + name, scene.k.data(), scene.k.bytes());
  report.bytes("store own " + name, scene.own_v.data(), scene.own_v.bytes());
  if (shape.kv.type == KvType::i8) report.floats("store scales " + name, scene.k_scales.data(), scene.k_scales.count());
  const Array<float> out(scene.rows() * scene.width()), again(out.count());
  scene.attend(out.data());
  report.floats("attention " + name, out.data(), out.count());
  const int threads = dfk::thread_count();
  dfk::set_thread_count(threads == 1 ? 3 : 1);
  scene.attend(again.data());
  dfk::set_thread_count(threads);
  report.require(same(out.data(), again.data(), out.count()), "attention " + name + ", with other threads");
}

void attentions(Report& report) {
  const char* const names[] = {"f32", "bf16", "i8"};
  for (int type = 0; type < 3; ++type) {
    const std::string name = names[type];
    const auto kv = [&](int64_t heads, int64_t dim) { return dfk::KvShape{static_cast<KvType>(type), heads, dim}; };
    // One row over more than one range, a causal block, a block that sees itself whole.
    attend(report, name + " spans",
           {kv(2, 64), 6, 64, 64, 64, 0, 0.0f, {{1, 1100, 1, true, false}, {9, 40, 9, true, false}, {16, 133, 16, false, false}}});
    // A head size that no register divides, a part of it rotated, norms over all heads, some keys hidden.
    attend(report, name + " masked",
           {kv(3, 40), 3, 12, 120, 120, 0, 0.0f, {{5, 50, 5, false, true}, {3, 0, 3, true, false}, {2, 17, 0, true, true}}});
    attend(report, name + " window", {kv(1, 80), 4, 80, 0, 80, 21, 30.0f, {{20, 100, 20, true, false}, {1, 15, 1, true, false}}});
  }
}

}  // namespace

int rows() {
  Report report;
  packing(report);
  preparing(report);
  linears(report);
  turned(report);
  gates(report);
  caps(report);
  heads(report);
  adapters(report);
  attentions(report);
  return report.wrong() > 0 ? 1 : 0;
}

}  // namespace driver
