#include "weights.h"

namespace driver {
namespace {

using dfk::Format;

int64_t bits_of(Format f) {
  switch (f) {
    case Format::f32: return 32;
    case Format::bf16: return 16;
    case Format::w4g:
    case Format::w4s: return 4;
    case Format::w6g: return 6;
    default: return 8;
  }
}

// Inputs that lie together in a panel: k is rounded up to them.
int64_t step_of(Format f) {
  switch (f) {
    case Format::f32: return 1;
    case Format::bf16: return 2;
    case Format::w4g: return 8;
    case Format::w6g: return 16;
    case Format::w4s: return 32;
    default: return 4;
  }
}

int64_t natural_bytes(Format f) { return f == Format::f32 ? 4 : f == Format::bf16 ? 2 : 1; }

}  // namespace

Weights::Weights(const Kind& kind, int64_t n, int64_t k, Numbers& numbers, bool biased)
    : kind(kind), n(n), k(k), codes(n * k * natural_bytes(kind.format)) {
  draw(numbers);
  if (biased) bias = bells(numbers, n);
  const int64_t width = dfk::round_up(k, step_of(kind.format)) * bits_of(kind.format) / 8;
  const int64_t side = kind.format == Format::w4s ? k / 32 : 0;  // bytes of a channel's steps
  data = Array<uint8_t>(panels() * dfk::kPanel * (width + side));
  const bool per_row = kind.per_row();
  if (per_row) panel_row_scales = Array<float>(panels() * dfk::kPanel);
  if (kind.group() > 0) panel_scales = Array<uint16_t>(panels() * dfk::kPanel * groups());
  if (kind.mins) panel_mins = Array<uint16_t>(panels() * dfk::kPanel * groups());
  dfk::pack(kind.format, n, k, codes.data(), per_row ? static_cast<const void*>(row_scales.data()) : scales.data(),
            mins.or_null(), steps.or_null(), data.data(), per_row ? static_cast<void*>(panel_row_scales.data()) : panel_scales.data(),
            panel_mins.or_null());
}

void Weights::draw(Numbers& numbers) {
  const Format f = kind.format;
  for (int64_t i = 0; i < n * k; ++i) {
    const float value = numbers.bell() * 0.1f;
    uint32_t raw;
    std::memcpy(&raw, &value, sizeof raw);
    if (f == Format::f32) std::memcpy(codes.data() + 4 * i, &raw, 4);
    else if (f == Format::bf16) std::memcpy(codes.data() + 2 * i, reinterpret_cast<const char*>(&raw) + 2, 2);
    else if (f == Format::w4g || f == Format::w4s) codes[i] = static_cast<uint8_t>(raw & 15);
    else if (f == Format::w6g) codes[i] = static_cast<uint8_t>(raw & 63);
    else codes[i] = static_cast<uint8_t>(raw & 255);  // int8, -128 among them
  }
  if (kind.per_row()) {
    row_scales = Array<float>(n);
    for (int64_t i = 0; i < n; ++i) row_scales[i] = (1.5f + numbers.unit()) * 0x1p-9f;
  }
  if (f == Format::w4s) {  // codes up to where a step away from zero would leave a signed byte
    steps = Array<uint8_t>(n * (k / 32));
    for (int64_t i = 0; i < steps.count(); ++i) steps[i] = static_cast<uint8_t>(numbers.next() & 255);
    for (int64_t i = 0; i < n * k; ++i) {
      const int step = (steps[i / 32] & 15) + 1, zero = steps[i / 32] >> 4;
      const int least = zero - 128 / step, most = zero + 127 / step;
      if (codes[i] < least) codes[i] = static_cast<uint8_t>(least);
      if (codes[i] > most) codes[i] = static_cast<uint8_t>(most);
    }
  }
  if (kind.group() == 0) return;
  scales = Array<uint16_t>(n * groups());
  if (kind.mins) mins = Array<uint16_t>(n * groups());
  for (Array<uint16_t>* side : {&scales, &mins}) {
    for (int64_t i = 0; i < side->count(); ++i) {
      (*side)[i] = half_scale(numbers);
      // Equal halves: everywhere, or in inputs 128 to 255, 384 to 511, ... (a slice of w6g is 128 inputs).
      const int64_t at = i % groups();
      const bool equal = kind.halves == Halves::same || (kind.halves == Halves::mixed && at / 8 % 2 == 1);
      if (equal && at % 2 == 1) (*side)[i] = (*side)[i - 1];
    }
  }
}

dfk::Linear Weights::linear() const {
  const void* const side = kind.per_row() ? static_cast<const void*>(panel_row_scales.or_null()) : panel_scales.or_null();
  return {kind.format, n, k, data.data(), side, panel_mins.or_null(), bias.or_null()};
}

Inputs::Inputs(dfk::ActKind kind, int64_t rows, int64_t k)
    : memory_(static_cast<int64_t>(dfk::acts_bytes(kind, rows, k))) {
  acts = dfk::acts_at(memory_.data(), kind, rows, k);
}

Inputs::Inputs(dfk::ActKind kind, const float* x, int64_t ldx, int64_t rows, int64_t k, const float* norm, float eps)
    : Inputs(kind, rows, k) {
  dfk::prepare(x, ldx, norm, eps, acts);
}

}  // namespace driver
