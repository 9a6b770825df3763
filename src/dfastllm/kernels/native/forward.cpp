#include "forward.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "pool.h"

namespace dfk {

void* Buffer::bytes(size_t count) {
  if (count > size_) {
    const size_t wanted = (count + 63) / 64 * 64;
    data_.reset();  // before the new one: the peak is the larger of both, not the sum
    size_ = 0;
    data_.reset(std::aligned_alloc(64, wanted));
    if (!data_) throw std::bad_alloc();
    size_ = wanted;
  }
  return data_.get();
}

KvLayer KvMemory::layer(int64_t i) const {
  KvLayer out = first;
  out.k = static_cast<char*>(first.k) + i * stride;
  out.v = static_cast<char*>(first.v) + i * stride;
  if (first.k_scales != nullptr) {
    out.k_scales = first.k_scales + i * scale_stride;
    out.v_scales = first.v_scales + i * scale_stride;
  }
  return out;
}

void Forward::require(const Step& step, const KvShape& kv, int64_t layers) const {
  if (step.id.most >= d_.embed.n) {
    throw std::invalid_argument("the step has id " + std::to_string(step.id.most) + "; this model has " +
                                std::to_string(d_.embed.n) + " embedding rows.");
  }
  if (kv.kv_heads != d_.kv.kv_heads || kv.dim != d_.kv.dim || kv.type != d_.kv.type ||
      layers != static_cast<int64_t>(d_.layers.size())) {
    throw std::invalid_argument("these K,V are not of this model's shape.");
  }
  if (step.adapted) throw std::invalid_argument("the step asks for adapters, which this forward has none of.");
}

size_t Forward::bytes_held() const {
  size_t total = x_.size() + qkv_.size() + mixed_.size() + cos_.size() + sin_.size() + h_.size() + tail_.size() + next_.size();
  for (const Buffer& b : acts_) total += b.size();
  return total;
}

const Acts& Forward::prepared(ActKind kind, const float* x, int64_t ldx, int64_t rows, int64_t k, const float* norm) {
  const int i = static_cast<int>(kind);
  at_[i] = acts_at(acts_[i].bytes(acts_bytes(kind, rows, k)), kind, rows, k);
  prepare(x, ldx, norm, d_.eps, at_[i]);
  return at_[i];
}

void Forward::attend(const Layer& layer, const Step& step, const KvLayer& cache, const KvLayer& own, float* qkv) {
  const int64_t stride = (d_.heads + 2 * d_.kv.kv_heads) * d_.dim;
  RopeStore rope{};
  rope.qkv = qkv;
  rope.rows = step.rows;
  rope.stride = stride;
  rope.heads = d_.heads;
  rope.q_norm = layer.q_norm;
  rope.k_norm = layer.k_norm;
  rope.eps = d_.eps;
  rope.cos = cos_.floats(0);
  rope.sin = sin_.floats(0);
  rope.rotary = d_.rotary;
  rope.shape = d_.kv;
  rope.cache = cache;
  rope.own = own;
  rope.slot = step.slot;
  rope.own_slot = step.own_slot;
  rope_store(rope);

  Attention a{};
  a.q = qkv;
  a.rows = step.rows;
  a.stride = stride;
  a.heads = d_.heads;
  a.scale = 1.0f / std::sqrt(static_cast<float>(d_.dim));
  a.shape = d_.kv;
  a.cache = cache;
  a.own = own;
  a.spans = step.spans.data();
  a.span_count = static_cast<int64_t>(step.spans.size());
  a.cached_limit = step.cached_limit;
  a.own_limit = step.own_limit;
  a.out = mixed_.floats(0);
  attention(a);
}

// Rows `index` of x [..][width] -> out, in order.
static void gather(const float* x, int64_t width, const int32_t* index, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(out + i * width, x + index[i] * width, static_cast<size_t>(width) * sizeof(float));
  }
}

void Forward::run(const Step& step, const KvMemory& cache, const KvLayer& own, float* out) {
  const int64_t hidden = d_.hidden, mixed = d_.heads * d_.dim, half = d_.rotary / 2;
  const int64_t stride = mixed + 2 * d_.kv.kv_heads * d_.dim;
  int64_t rows = step.rows;
  float* x = x_.floats(static_cast<size_t>(rows * hidden));
  float* qkv = qkv_.floats(static_cast<size_t>(rows * stride));
  mixed_.floats(static_cast<size_t>(rows * mixed));
  float* cos = cos_.floats(static_cast<size_t>(rows * half));
  float* sin = sin_.floats(static_cast<size_t>(rows * half));

  ids_.assign(step.ids, step.ids + rows);
  weight_rows(d_.embed, ids_.data(), rows, x);
  parallel((rows + 7) / 8, [&](int64_t task, int) {
    for (int64_t r = task * 8; r < std::min(rows, task * 8 + 8); ++r) {
      for (int64_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(step.positions[r]) * d_.frequencies[i];
        cos[r * half + i] = std::cos(angle) * d_.rope_factor;
        sin[r * half + i] = std::sin(angle) * d_.rope_factor;
      }
    }
  });

  const int64_t last = static_cast<int64_t>(d_.layers.size()) - 1;
  for (int64_t i = 0; i <= last; ++i) {
    const Layer& layer = d_.layers[static_cast<size_t>(i)];
    int64_t column = 0;
    bool done[4] = {};
    for (const Linear& w : layer.qkv) {
      const ActKind kind = act_kind(w.format);
      bool& ready = done[static_cast<int>(kind)];
      const Acts& acts = ready ? at_[static_cast<int>(kind)] : prepared(kind, x, hidden, rows, hidden, layer.attn_norm);
      ready = true;
      linear(w, acts, qkv + column, stride, false);
      column += w.n;
    }
    attend(layer, step, cache.layer(i), own, qkv);

    const float* mix = mixed_.floats(0);
    if (i == last) {  // what follows is only looked at in the wanted rows
      if (step.wanted == 0) return;
      float* some = tail_.floats(static_cast<size_t>(step.wanted * (hidden + mixed)));
      gather(x, hidden, step.want, step.wanted, some);
      gather(mix, mixed, step.want, step.wanted, some + step.wanted * hidden);
      x = some;
      mix = some + step.wanted * hidden;
      rows = step.wanted;
    }
    linear(layer.o, prepared(act_kind(layer.o.format), mix, mixed, rows, mixed, nullptr), x, hidden, true);

    const Acts& in = prepared(act_kind(layer.gate_up.format), x, hidden, rows, hidden, layer.mlp_norm);
    const ActKind kind = act_kind(layer.down.format);
    const int64_t inner = layer.down.k;  // gate_up may be padded to whole panels
    Acts h = acts_at(next_.bytes(acts_bytes(kind, rows, inner)), kind, rows, inner);
    linear_swiglu(layer.gate_up, in, h_.floats(static_cast<size_t>(rows * inner)), h);
    linear(layer.down, h, x, hidden, true);
  }
  Acts plain{ActKind::f32, rows, hidden, hidden, out, nullptr, nullptr};
  prepare(x, hidden, d_.norm, d_.eps, plain);
}

}  // namespace dfk
