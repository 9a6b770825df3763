#include "scene.h"

namespace driver {
namespace {

int64_t blocks_of(int64_t keys) { return (keys + dfk::kBlock - 1) / dfk::kBlock; }

int64_t width_of(dfk::KvType type) { return type == dfk::KvType::f32 ? 4 : type == dfk::KvType::bf16 ? 2 : 1; }

// 0 to count - 1 in some order.
std::vector<int32_t> shuffled(int64_t count, Numbers& numbers) {
  std::vector<int32_t> out(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t j = numbers.below(i + 1);
    out[static_cast<size_t>(i)] = out[static_cast<size_t>(j)];
    out[static_cast<size_t>(j)] = static_cast<int32_t>(i);
  }
  return out;
}

}  // namespace

Scene::Scene(SceneShape wanted, Numbers& numbers) : shape(std::move(wanted)) {
  for (const SpanShape& span : shape.spans) {
    filling_ += span.cached;
    rows_ += span.rows;
  }
  const int64_t all = filling_ + rows_, half = shape.rotary / 2;
  qkv = bells(numbers, all * stride());
  cos_ = Array<float>(all * half);
  sin_ = Array<float>(all * half);
  for (int64_t i = 0; i < all * half; ++i) {  // any numbers below 1 will do as an angle's
    cos_[i] = numbers.unit();
    sin_[i] = numbers.unit();
  }
  if (shape.q_norm > 0) q_norm_ = bells(numbers, shape.q_norm);
  if (shape.k_norm > 0) k_norm_ = bells(numbers, shape.k_norm);
  lay_out(numbers);
  fill_limits();
}

void Scene::lay_out(Numbers& numbers) {
  int64_t cached = 0, owned = 0;
  for (const SpanShape& span : shape.spans) {
    cached += blocks_of(span.cached);
    owned += blocks_of(span.own);
  }
  const int64_t bytes = shape.kv.block_elements() * width_of(shape.kv.type), scales = shape.kv.kv_heads * dfk::kBlock;
  k = Array<char>(cached * bytes);
  v = Array<char>(cached * bytes);
  own_k = Array<char>(owned * bytes);
  own_v = Array<char>(owned * bytes);
  if (shape.kv.type == dfk::KvType::i8) {
    for (Array<float>* side : {&k_scales, &v_scales}) *side = Array<float>(cached * scales);
    for (Array<float>* side : {&own_k_scales, &own_v_scales}) *side = Array<float>(owned * scales);
  }
  const std::vector<int32_t> order = shuffled(cached, numbers), own_order = shuffled(owned, numbers);
  slot_.assign(static_cast<size_t>(filling_), 0);
  own_slot_.assign(static_cast<size_t>(filling_), -1);
  const int32_t* at = order.data();
  const int32_t* own_at = own_order.data();
  size_t filled = 0;
  for (const SpanShape& span : shape.spans) {
    blocks_.emplace_back(at, at + blocks_of(span.cached));
    own_blocks_.emplace_back(own_at, own_at + blocks_of(span.own));
    at += blocks_of(span.cached);
    own_at += blocks_of(span.own);
    const auto slot_of = [](const std::vector<int32_t>& blocks, int64_t key) {
      return static_cast<int32_t>(blocks[static_cast<size_t>(key / dfk::kBlock)] * dfk::kBlock + key % dfk::kBlock);
    };
    for (int64_t key = 0; key < span.cached; ++key) slot_[filled++] = slot_of(blocks_.back(), key);
    for (int64_t row = 0; row < span.rows; ++row) {
      slot_.push_back(-1);
      own_slot_.push_back(row < span.own ? slot_of(own_blocks_.back(), row) : -1);
    }
    masks_.emplace_back(span.masked ? span.rows * (span.cached + span.own) : 0);
    for (int64_t i = 0; i < masks_.back().count(); ++i) masks_.back()[i] = numbers.often(3) ? 0 : 1;
  }
}

void Scene::fill_limits() {
  int64_t row = 0;
  for (size_t i = 0; i < shape.spans.size(); ++i) {
    const SpanShape& span = shape.spans[i];
    spans_.push_back({static_cast<int32_t>(row), static_cast<int32_t>(row + span.rows), static_cast<int32_t>(span.cached),
                      static_cast<int32_t>(span.own), blocks_[i].data(), own_blocks_[i].data(), masks_[i].or_null(),
                      static_cast<int32_t>(span.cached)});
    for (int64_t r = 0; r < span.rows; ++r, ++row) {
      cached_limit_.push_back(static_cast<int32_t>(span.cached));
      own_limit_.push_back(static_cast<int32_t>(span.own == 0 ? 0 : span.causal ? r + 1 : span.own));
      position_.push_back(static_cast<int32_t>(span.cached + r));
    }
  }
  if (shape.window == 0) return;
  cached_from_.assign(static_cast<size_t>(rows_), 0);
  own_from_ = cached_from_;
  dfk::window_from(spans_.data(), static_cast<int64_t>(spans_.size()), position_.data(), shape.window, cached_from_.data(),
                   own_from_.data());
}

void Scene::store() {
  dfk::RopeStore a{};
  a.qkv = qkv.data();
  a.rows = filling_ + rows_;
  a.stride = stride();
  a.heads = shape.heads;
  a.q_norm = q_norm_.or_null();
  a.k_norm = k_norm_.or_null();
  a.q_size = shape.q_norm;
  a.k_size = shape.k_norm;
  a.eps = 1e-6f;
  a.cos = cos_.data();
  a.sin = sin_.data();
  a.rotary = shape.rotary;
  a.shape = shape.kv;
  a.cache = cache();
  a.own = own();
  a.slot = slot_.data();
  a.own_slot = own_slot_.data();
  dfk::rope_store(a);
}

dfk::Attention Scene::attention(float* out) const {
  dfk::Attention a{};
  a.q = qkv.data() + filling_ * stride();
  a.rows = rows_;
  a.stride = stride();
  a.heads = shape.heads;
  a.scale = 1.0f / 8.0f;
  a.softcap = shape.softcap;
  a.shape = shape.kv;
  a.cache = cache();
  a.own = own();
  a.spans = spans_.data();
  a.span_count = static_cast<int64_t>(spans_.size());
  a.cached_limit = cached_limit_.data();
  a.own_limit = own_limit_.data();
  a.cached_from = cached_from_.empty() ? nullptr : cached_from_.data();
  a.own_from = own_from_.empty() ? nullptr : own_from_.data();
  a.out = out;
  return a;
}

}  // namespace driver
