#include "forward.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "pool.h"

namespace dfk {

void Forward::require(const Step& step, const KvMemory& cache) const {
  if (step.id.most >= d_.embed.n) {
    throw std::invalid_argument("the step has id " + std::to_string(step.id.most) + "; this model has " +
                                std::to_string(d_.embed.n) + " embedding rows.");
  }
  if (!(cache.shape == d_.kv) || cache.layers != static_cast<int64_t>(d_.layers.size())) {
    throw std::invalid_argument("these K,V are not of this model's shape.");
  }
  const auto mixes = [](const Op& op) { return std::holds_alternative<Mix>(op); };
  if (d_.layers.empty() || std::none_of(d_.layers.back().begin(), d_.layers.back().end(), mixes)) {
    throw std::invalid_argument("the last layer has no attention.");
  }
  if (!step.adapted) return;
  for (int64_t row = 0; row < step.rows; ++row) {
    const size_t number = static_cast<size_t>(step.adapter[row]);
    if (number > 0 && (number >= table_.size() || table_[number] == nullptr)) {
      throw std::invalid_argument("the step asks for adapter " + std::to_string(number) + ", which this forward has none of.");
    }
  }
}

size_t Forward::bytes_held() const {
  size_t total = x_.size() + wide_.size() + mixed_.size() + h_.size() + tail_.size() + next_.size();
  total += low_rank_.bytes_held() + mixture_.bytes_held();
  for (const Buffer& b : acts_) total += b.size();
  for (const std::vector<Buffer>* side : {&cos_, &sin_}) {
    for (const Buffer& b : *side) total += b.size();
  }
  return total;
}

namespace {

void require_width(const char* what, int64_t wanted, int64_t got) {
  if (wanted != got) {
    throw std::invalid_argument(std::string(what) + " takes " + std::to_string(wanted) + " values, the op before gives " +
                                std::to_string(got) + ".");
  }
}

void require_norm(const Norm& norm, int64_t width) {
  if (norm.weight != nullptr) require_width("a norm", norm.size, width);
}

// Rows `index` of x [..][width] -> out, in order.
void gather(const float* x, int64_t width, const int32_t* index, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(out + i * width, x + index[i] * width, static_cast<size_t>(width) * sizeof(float));
  }
}

// f(first, last) for stretches of `count` values, on the pool.
template <class F>
void in_pieces(int64_t count, F&& f) {
  constexpr int64_t piece = 1 << 14;
  parallel((count + piece - 1) / piece, [&](int64_t task, int) { f(task * piece, std::min(count, (task + 1) * piece)); });
}

}  // namespace

void Forward::add(RopeTable table) {
  if (2 * static_cast<int64_t>(table.frequencies.size()) > d_.kv.dim) {
    throw std::invalid_argument("more rotary dims than a head has.");
  }
  d_.ropes.push_back(std::move(table));
  cos_.emplace_back();
  sin_.emplace_back();
}

void Forward::begin_layer() {
  d_.layers.emplace_back();
  width_ = d_.hidden;
}

void Forward::add(Op op) {
  if (d_.layers.empty()) throw std::invalid_argument("an op before the first layer.");
  if (gated_ && !std::holds_alternative<Project>(op)) throw std::invalid_argument("only a linear may follow a gate.");
  if (auto* project = std::get_if<Project>(&op)) {
    require_norm(project->norm, width_);
    int64_t n = 0;
    for (const Linear& linear : project->linears) {
      require_width("a linear", linear.k, width_);
      n += linear.n;
    }
    if (project->onto_stream) require_width("the stream", d_.hidden, n);
    if (gated_ && (project->norm.weight != nullptr || project->linears.size() != 1)) {
      throw std::invalid_argument("a linear after a gate is one matrix without a norm.");
    }
    project->site = static_cast<int64_t>(sites_.size());
    sites_.push_back({width_, n});
    width_ = n;
    widest_ = std::max(widest_, n);
    gated_ = false;
  } else if (auto* gated = std::get_if<Gated>(&op)) {
    require_norm(gated->norm, width_);
    require_width("a gate", gated->linear.k, width_);
    if (gated->linear.n != (gated->width + kPanel / 2 - 1) / (kPanel / 2) * kPanel) {
      throw std::invalid_argument("gate and up must alternate by 32 channels.");
    }
    if (gated->block < 1 || (gated->block & (gated->block - 1)) != 0 || gated->width % gated->block != 0) {
      throw std::invalid_argument("a gate turns stretches of a power of two that divides its width.");
    }
    gated->site = static_cast<int64_t>(sites_.size());
    sites_.push_back({width_, gated->linear.n});
    width_ = gated->width;
    gated_ = true;
  } else if (const auto* mix = std::get_if<Mix>(&op)) {
    const int64_t q = d_.heads * d_.kv.dim, k = d_.kv.kv_heads * d_.kv.dim;
    require_width("attention", q + 2 * k, width_);
    if (d_.layers.back().empty() || !std::holds_alternative<Project>(d_.layers.back().back())) {
      throw std::invalid_argument("attention takes what a linear gives.");
    }
    const bool fits = (mix->q_norm.weight == nullptr || mix->q_norm.size == d_.kv.dim || mix->q_norm.size == q) &&
                      (mix->k_norm.weight == nullptr || mix->k_norm.size == d_.kv.dim || mix->k_norm.size == k);
    if (!fits) throw std::invalid_argument("norms of q and k go over a head or over all of them.");
    if (mix->table >= static_cast<int64_t>(d_.ropes.size())) throw std::invalid_argument("there is no such rotary table.");
    width_ = q;
  } else if (const auto* normalise = std::get_if<Normalise>(&op)) {
    require_norm(normalise->norm, width_);
  } else if (auto* experts = std::get_if<Experts>(&op)) {
    const Mixture& m = experts->mixture;
    require_norm(experts->norm, width_);
    require_mixture(m);
    require_width("a mixture of experts", m.hidden(), width_);
    require_width("the stream", d_.hidden, width_);
    experts->site = static_cast<int64_t>(sites_.size());
    sites_.push_back({width_, m.router.experts});
    for (const std::vector<FeedForward>* side : {&m.experts, &m.shared}) {
      for (const FeedForward& block : *side) {
        sites_.push_back({width_, block.gated.n});
        sites_.push_back({block.down.k, width_});
      }
    }
  } else {
    require_width("the stream", d_.hidden, width_);
  }
  d_.layers.back().push_back(std::move(op));
}

const Acts& Forward::prepared(ActKind kind, const float* x, int64_t ldx, int64_t rows, int64_t k, const Norm& norm) {
  const int i = static_cast<int>(kind);
  at_[i] = acts_at(acts_[i].bytes(acts_bytes(kind, rows, k)), kind, rows, k);
  prepare(x, ldx, norm.weight, norm.eps, at_[i]);
  return at_[i];
}

void Forward::fill_angles(const Step& step) {
  for (size_t t = 0; t < d_.ropes.size(); ++t) {
    const RopeTable& table = d_.ropes[t];
    const int64_t half = static_cast<int64_t>(table.frequencies.size());
    float* cos = cos_[t].floats(static_cast<size_t>(step.rows * half));
    float* sin = sin_[t].floats(static_cast<size_t>(step.rows * half));
    parallel((step.rows + 7) / 8, [&](int64_t task, int) {
      for (int64_t r = task * 8; r < std::min(step.rows, task * 8 + 8); ++r) {
        for (int64_t i = 0; i < half; ++i) {
          const float angle = static_cast<float>(step.positions[r]) * table.frequencies[static_cast<size_t>(i)];
          cos[r * half + i] = std::cos(angle) * table.factor;
          sin[r * half + i] = std::sin(angle) * table.factor;
        }
      }
    });
  }
}

const Forward::Window& Forward::window_of(const Step& step, int64_t size) {
  for (const Window& window : windows_) {
    if (window.size == size) return window;
  }
  const std::vector<int32_t> none(static_cast<size_t>(step.rows), 0);
  windows_.push_back({size, none, none});
  Window& made = windows_.back();
  window_from(step.spans.data(), static_cast<int64_t>(step.spans.size()), step.positions, size, made.cached_from.data(),
              made.own_from.data());
  return made;
}

// One pass over the ops: the stream x and the branch h, `width` values a row, or prepared rows of it.
struct Forward::Pass {
  Forward& f;
  const Step& step;
  float* x;
  int64_t rows;
  const float* h = nullptr;
  int64_t width = 0;
  const Acts* ready = nullptr;
  const float* gated = nullptr;  // what `ready` was prepared of: there where the Project that follows is adapted
  KvLayer cache{}, own{};

  void begin() {
    h = x;
    width = f.d_.hidden;
    ready = nullptr;
  }

  void operator()(const Project& op) {
    int64_t n = 0, column = 0;
    for (const Linear& w : op.linears) n += w.n;
    float* const out = op.onto_stream ? x : f.wide_.floats(0);
    const LowRank* const work = take_inputs(op.site, ready != nullptr ? gated : h, op.norm);
    bool done[4] = {};
    for (const Linear& w : op.linears) {
      const ActKind kind = act_kind(w.format);
      bool& made = done[static_cast<int>(kind)];
      const Acts& in = ready != nullptr ? *ready
                       : made           ? f.at_[static_cast<int>(kind)]
                                        : f.prepared(kind, h, width, rows, width, op.norm);
      made = true;
      linear(w, in, out + column, n, op.onto_stream, {work, column});
      column += w.n;
    }
    ready = nullptr;
    if (op.onto_stream) return begin();
    h = out;
    width = n;
  }

  void operator()(const Gated& op) {
    const LowRank* const work = take_inputs(op.site, h, op.norm);
    const Acts& in = f.prepared(act_kind(op.linear.format), h, width, rows, width, op.norm);
    f.next_at_ = acts_at(f.next_.bytes(acts_bytes(op.kind, rows, op.width)), op.kind, rows, op.width);
    float* const product = f.h_.floats(static_cast<size_t>(rows * op.width));
    const bool kept = f.adapted_.touches(op.site + 1);
    linear_gated(op.linear, in, op.activation, product, f.next_at_, op.block, {work, 0}, kept);
    gated = product;
    ready = &f.next_at_;
    width = op.width;
  }

  // What adapters add to a site's linear, of its inputs; null: nothing.
  const LowRank* take_inputs(int64_t site, const float* from, const Norm& norm) {
    if (!f.adapted_.touches(site)) return nullptr;
    f.adapted_.fill(site, f.low_rank_);
    f.low_rank_.take(from, width, width, norm.weight, norm.eps);
    return &f.low_rank_;
  }

  void operator()(const Mix& op) {
    const Decoder& d = f.d_;
    RopeStore rope{};
    rope.qkv = f.wide_.floats(0);  // that is h: a Project made it
    rope.rows = rows;
    rope.stride = width;
    rope.heads = d.heads;
    rope.q_norm = op.q_norm.weight;
    rope.k_norm = op.k_norm.weight;
    rope.q_size = op.q_norm.size;
    rope.k_size = op.k_norm.size;
    rope.eps = op.q_norm.eps;
    if (op.table >= 0) {
      const size_t t = static_cast<size_t>(op.table);
      rope.cos = f.cos_[t].floats(0);
      rope.sin = f.sin_[t].floats(0);
      rope.rotary = 2 * static_cast<int64_t>(d.ropes[t].frequencies.size());
    }
    rope.shape = d.kv;
    rope.cache = cache;
    rope.own = own;
    rope.slot = step.slot;
    rope.own_slot = step.own_slot;
    rope_store(rope);

    Attention a{};
    a.q = rope.qkv;
    a.rows = rows;
    a.stride = width;
    a.heads = d.heads;
    a.scale = op.scale;
    a.softcap = op.softcap;
    a.shape = d.kv;
    a.cache = cache;
    a.own = own;
    a.spans = step.spans.data();
    a.span_count = static_cast<int64_t>(step.spans.size());
    a.cached_limit = step.cached_limit;
    a.own_limit = step.own_limit;
    if (op.window > 0) {
      const Window& window = f.window_of(step, op.window);
      a.cached_from = window.cached_from.data();
      a.own_from = window.own_from.data();
    }
    width = d.heads * d.kv.dim;
    a.out = f.mixed_.floats(static_cast<size_t>(rows * width));
    attention(a);
    h = a.out;
  }

  void operator()(const Normalise& op) {
    float* const out = f.wide_.floats(0);  // may be h itself: a row's sum is made before it is written
    prepare(h, width, op.norm.weight, op.norm.eps, Acts{ActKind::f32, rows, width, width, out, nullptr, nullptr});
    h = out;
  }

  void operator()(const Experts& op) {
    float* const out = op.onto_stream ? x : f.wide_.floats(0);  // may be h itself, which is read before
    f.mixture_.run(op.mixture, h, width, rows, op.norm.weight, op.norm.eps, f.adapted_, op.site, out, op.onto_stream);
    if (op.onto_stream) return begin();
    h = out;
  }

  void operator()(const Sum& op) {
    in_pieces(rows * width, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) x[i] += op.factor * h[i];
    });
    begin();
  }

  // What follows the last attention is only looked at in the wanted rows.
  void keep_wanted() {
    const int64_t wanted = step.wanted, hidden = f.d_.hidden;
    float* const some = f.tail_.floats(static_cast<size_t>(wanted * (hidden + width)));
    gather(x, hidden, step.want, wanted, some);
    gather(h, width, step.want, wanted, some + wanted * hidden);
    x = some;
    h = some + wanted * hidden;
    rows = wanted;
    if (!step.adapted) return;
    std::vector<int32_t> numbers(static_cast<size_t>(wanted));
    for (int64_t i = 0; i < wanted; ++i) numbers[static_cast<size_t>(i)] = step.adapter[step.want[i]];
    f.adapted_.set(f.table_, numbers.data(), wanted);
  }

  // The embedding's rows, as their adapters have them.
  void embed() {
    for (const AdaptedRows::Group& g : f.adapted_.groups()) {
      if (!g.adapter->embeds()) continue;
      const int32_t* const which = f.adapted_.rows() + g.first;
      parallel(g.count, [&](int64_t i, int) {
        adapt_embedding(*g.adapter, step.ids[which[i]], f.d_.hidden, x + which[i] * f.d_.hidden);
      });
    }
  }
};

void Forward::require_site(const Adapter& adapter, int64_t site) const {
  for (const Delta& d : adapter.sites[static_cast<size_t>(site)]) {
    const Site& at = sites_[static_cast<size_t>(site)];
    if (!fits(d, at.k, at.n)) {
      throw std::invalid_argument("an adapter's matrix [" + std::to_string(d.n) + ", " + std::to_string(d.k) +
                                  "] does not fit the linear that it is for.");
    }
  }
}

void Forward::set_adapters(std::vector<const Adapter*> table) {
  if (table.empty() || table[0] != nullptr) throw std::invalid_argument("adapter 0 stands for none.");
  for (const Adapter* adapter : table) {
    if (adapter == nullptr) continue;
    if (adapter->sites.size() != sites_.size()) throw std::invalid_argument("an adapter of another model's linears.");
    for (size_t site = 0; site < sites_.size(); ++site) require_site(*adapter, static_cast<int64_t>(site));
    if (adapter->embed_full.rows > d_.embed.n) throw std::invalid_argument("an adapter with more embedding rows than the model.");
    for (const Delta& d : adapter->embed) {
      if (d.n != d_.hidden) throw std::invalid_argument("an adapter of an embedding of another width.");
    }
  }
  table_ = std::move(table);
}

bool Forward::run(const Step& step, const KvMemory& cache, const KvLayer& own, float* out, const int64_t* halt) {
  const int64_t hidden = d_.hidden;
  Pass pass{*this, step, x_.floats(static_cast<size_t>(step.rows * hidden)), step.rows};
  ids_.assign(step.ids, step.ids + step.rows);
  weight_rows(d_.embed, ids_.data(), step.rows, pass.x);
  adapted_.clear();
  if (step.adapted) {
    adapted_.set(table_, step.adapter, step.rows);
    pass.embed();
  }
  if (d_.embed_factor != 1.0f) {
    in_pieces(step.rows * hidden, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) pass.x[i] *= d_.embed_factor;
    });
  }
  wide_.floats(static_cast<size_t>(step.rows * std::max(widest_, hidden)));  // no growth, which loses what it holds, later
  fill_angles(step);
  windows_.clear();
  pass.own = own;
  const std::vector<Op>& last = d_.layers.back();
  const auto mixes = [](const Op& op) { return std::holds_alternative<Mix>(op); };
  const Op* const last_mix = &*std::find_if(last.rbegin(), last.rend(), mixes);
  for (size_t i = 0; i < d_.layers.size(); ++i) {
    if (halt != nullptr && __atomic_load_n(halt, __ATOMIC_RELAXED) == halt[1]) return false;
    pass.cache = cache.layer(static_cast<int64_t>(i));
    pass.begin();
    for (const Op& op : d_.layers[i]) {
      std::visit(pass, op);
      if (&op != last_mix) continue;
      if (step.wanted == 0) return true;
      pass.keep_wanted();
    }
  }
  prepare(pass.x, hidden, d_.norm.weight, d_.norm.eps, Acts{ActKind::f32, pass.rows, hidden, hidden, out, nullptr, nullptr});
  return true;
}

}  // namespace dfk
