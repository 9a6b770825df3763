#include "law.h"

#include <algorithm>
#include <cmath>

namespace driver {
namespace {

using dfk::Format;

double half_value(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const double size = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return h & 0x8000 ? -size : size;
}

double bf16_value(uint16_t h) {
  const uint32_t raw = static_cast<uint32_t>(h) << 16;
  float out;
  std::memcpy(&out, &raw, sizeof out);
  return out;
}

double float_weight(const Weights& w, int64_t i) {
  if (w.kind.format == Format::bf16) {
    uint16_t raw;
    std::memcpy(&raw, w.codes.data() + 2 * i, sizeof raw);
    return bf16_value(raw);
  }
  float out;
  std::memcpy(&out, w.codes.data() + 4 * i, sizeof out);
  return out;
}

// A weight's code, minus the format's offset (none where there are minima).
int64_t code(const Weights& w, int64_t channel, int64_t input) {
  const uint8_t raw = w.codes[channel * w.k + input];
  if (w.kind.format == Format::w8 || w.kind.format == Format::w8g) return static_cast<int8_t>(raw);
  if (w.kind.format == Format::w4s) {
    const uint8_t side = w.steps[channel * (w.k / 32) + input / 32];
    return static_cast<int8_t>((raw - (side >> 4)) * ((side & 15) + 1));
  }
  return raw - (w.kind.mins ? 0 : w.kind.format == Format::w4g ? 8 : 32);
}

// Sum over inputs [from, from + count) of a channel's codes times a row's.
int64_t dot(const Weights& w, int64_t channel, const int8_t* x, int64_t from, int64_t count) {
  int64_t sum = 0;
  for (int64_t i = from; i < from + count; ++i) sum += code(w, channel, i) * x[i];
  return sum;
}

int64_t sum_of(const int8_t* x, int64_t from, int64_t count) {
  int64_t sum = 0;
  for (int64_t i = from; i < from + count; ++i) sum += x[i];
  return sum;
}

// Whether w6g takes 32 inputs at once in the slice (128 inputs) of this group: all channels of the panel have equal scales
// and minima in both halves of the slice's groups.
bool whole(const Weights& w, int64_t channel, int64_t group) {
  if (w.kind.format != Format::w6g) return false;
  const int64_t first = channel / dfk::kPanel * dfk::kPanel, last = std::min(first + dfk::kPanel, w.n);
  const int64_t from = group / 4 * 4, to = std::min(from + 4, w.k / 32);
  for (int64_t c = first; c < last; ++c) {
    for (int64_t g = from; g < to; ++g) {
      const int64_t at = c * w.groups() + 2 * g;
      if (w.scales[at] != w.scales[at + 1] || (w.kind.mins && w.mins[at] != w.mins[at + 1])) return false;
    }
  }
  return true;
}

// Every product here is exact in a float, so one fused multiply-add a part rounds once.
float group_output(const Weights& w, const dfk::Acts& x, int64_t channel, int64_t row) {
  const int8_t* codes = static_cast<const int8_t*>(x.data) + row * x.stride;
  float y = 0.0f;
  for (int64_t g = 0; g < w.k / 32; ++g) {
    const int64_t parts = w.kind.format == Format::w6g && !whole(w, channel, g) ? 2 : 1, inputs = 32 / parts;
    const float x_scale = x.scales[row * (x.stride / 32) + g];
    const auto side = [&](const Array<uint16_t>& values, int64_t part) {
      const int64_t a_group = w.kind.group() == 16 ? 2 : 1;  // stored, of 32 inputs
      return static_cast<float>(half_value(values[channel * w.groups() + g * a_group + part]));
    };
    for (int64_t p = 0; p < parts; ++p) {
      const float sum = static_cast<float>(dot(w, channel, codes, g * 32 + p * inputs, inputs));
      y = std::fma(sum * x_scale, side(w.scales, p), y);
    }
    for (int64_t p = 0; w.kind.mins && p < parts; ++p) {
      const float weighted = x_scale * static_cast<float>(sum_of(codes, g * 32 + p * inputs, inputs));
      y = std::fma(-side(w.mins, p), weighted, y);
    }
  }
  return y;
}

double float_output(const Weights& w, const dfk::Acts& x, int64_t channel, int64_t row) {
  double y = 0;
  for (int64_t i = 0; i < w.k; ++i) {
    const double value = x.kind == dfk::ActKind::f32 ? static_cast<const float*>(x.data)[row * x.stride + i]
                                                     : bf16_value(static_cast<const uint16_t*>(x.data)[row * x.stride + i]);
    y += value * float_weight(w, channel * w.k + i);
  }
  return y;
}

float output(const Weights& w, const dfk::Acts& x, int64_t channel, int64_t row) {
  if (!w.kind.exact()) return static_cast<float>(float_output(w, x, channel, row));
  if (!w.kind.per_row()) return group_output(w, x, channel, row);
  const int8_t* codes = static_cast<const int8_t*>(x.data) + row * x.stride;
  return static_cast<float>(dot(w, channel, codes, 0, w.k)) * w.row_scales[channel] * x.scales[row];
}

// The value at dim `d` of a key or value.
double stored(const dfk::Attention& a, const dfk::KvLayer& layer, bool value, int64_t block, int64_t head, int64_t at, int64_t d) {
  const int64_t base = (block * a.shape.kv_heads + head) * a.shape.dim * dfk::kBlock;
  const int64_t i = base + (value ? at * a.shape.dim + d : d * dfk::kBlock + at);
  const void* const data = value ? layer.v : layer.k;
  switch (a.shape.type) {
    case dfk::KvType::f32: return static_cast<const float*>(data)[i];
    case dfk::KvType::bf16: return bf16_value(static_cast<const uint16_t*>(data)[i]);
    default: break;
  }
  const float* const scales = value ? layer.v_scales : layer.k_scales;
  return static_cast<double>(static_cast<const int8_t*>(data)[i]) * scales[(block * a.shape.kv_heads + head) * dfk::kBlock + at];
}

// One key that a row sees.
struct Seen {
  const dfk::KvLayer* layer;
  int64_t block, at;
};

std::vector<Seen> seen_by(const dfk::Attention& a, const dfk::SpanKeys& span, int64_t row) {
  std::vector<Seen> out;
  const uint8_t* mask = span.mask == nullptr ? nullptr : span.mask + (row - span.row0) * (span.cached + span.own);
  for (int64_t own = 0; own < 2; ++own) {
    const int32_t* const from = own ? a.own_from : a.cached_from;
    const int32_t* const blocks = own ? span.own_blocks : span.blocks;
    const int64_t limit = (own ? a.own_limit : a.cached_limit)[row], first = from == nullptr ? 0 : from[row];
    for (int64_t key = first; key < limit; ++key) {
      if (mask != nullptr && mask[(own ? span.cached : 0) + key] == 0) continue;
      out.push_back({own ? &a.own : &a.cache, blocks[key / dfk::kBlock], key % dfk::kBlock});
    }
  }
  return out;
}

void attend_row(const dfk::Attention& a, const std::vector<Seen>& keys, int64_t head, const float* q, float* out) {
  const int64_t dim = a.shape.dim, kv_head = head / (a.heads / a.shape.kv_heads);
  std::vector<double> weights;
  double most = -INFINITY, total = 0;
  for (const Seen& key : keys) {
    double score = 0;
    for (int64_t d = 0; d < dim; ++d) score += q[d] * stored(a, *key.layer, false, key.block, kv_head, key.at, d);
    score *= a.scale;
    if (a.softcap > 0) score = a.softcap * std::tanh(score / a.softcap);
    weights.push_back(score);
    most = std::max(most, score);
  }
  for (double& weight : weights) total += weight = std::exp(weight - most);
  for (int64_t d = 0; d < dim; ++d) {
    double sum = 0;
    for (size_t i = 0; i < keys.size(); ++i) {
      sum += weights[i] * stored(a, *keys[i].layer, true, keys[i].block, kv_head, keys[i].at, d);
    }
    out[d] = keys.empty() ? 0.0f : static_cast<float>(sum / total);
  }
}

}  // namespace

void linear_law(const Weights& w, const dfk::Acts& x, float* y) {
  for (int64_t row = 0; row < x.rows; ++row) {
    for (int64_t channel = 0; channel < w.n; ++channel) y[row * w.n + channel] = output(w, x, channel, row);
  }
}

const char* quantise_law(const float* x, const dfk::Acts& prepared, int64_t row) {
  const bool grouped = prepared.kind == dfk::ActKind::group8;
  const int64_t size = grouped ? 32 : prepared.stride;
  const int8_t* codes = static_cast<const int8_t*>(prepared.data) + row * prepared.stride;
  for (int64_t first = 0, part = 0; first < prepared.stride; first += size, ++part) {
    float most = 0;
    for (int64_t i = first; i < std::min(first + size, prepared.k); ++i) most = std::max(most, std::fabs(x[i]));
    float scale = most < 0x1p-100f ? 0.0f : most / 127.0f, inverse = most < 0x1p-100f ? 0.0f : 127.0f / most;
    if (grouped && scale > 0) {
      int exponent;
      const float fraction = std::frexp(scale, &exponent);  // in [0.5, 1)
      scale = std::ldexp(std::ceil(fraction * 8.0f), exponent - 3);
      inverse = 1.0f / scale;
    }
    if (prepared.scales[grouped ? row * (prepared.stride / 32) + part : row] != scale) return "scale";
    for (int64_t i = first; i < first + size; ++i) {
      const float value = i < prepared.k ? x[i] : 0.0f;
      if (codes[i] != static_cast<int8_t>(std::nearbyint(value * inverse))) return "code";
    }
    for (int64_t i = 0; grouped && i < 2; ++i) {
      if (prepared.sums[row * (prepared.stride / 16) + 2 * part + i] != sum_of(codes, first + 16 * i, 16)) return "sum of 16";
    }
    if (!grouped && prepared.sums[row] != sum_of(codes, 0, size)) return "sum of a row";
  }
  return nullptr;
}

void attention_law(const dfk::Attention& a, float* out) {
  const int64_t width = a.heads * a.shape.dim;
  std::fill(out, out + a.rows * width, 0.0f);
  for (int64_t i = 0; i < a.span_count; ++i) {
    for (int64_t row = a.spans[i].row0; row < a.spans[i].row1; ++row) {
      const std::vector<Seen> keys = seen_by(a, a.spans[i], row);
      for (int64_t head = 0; head < a.heads; ++head) {
        attend_row(a, keys, head, a.q + row * a.stride + head * a.shape.dim, out + row * width + head * a.shape.dim);
      }
    }
  }
}

}  // namespace driver
