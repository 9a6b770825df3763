// Between the natural form of a weight matrix and panels; kernels/packed.py defines both and does the same in torch.
#include <cstring>

#include "linear.h"
#include "linear_natural.h"
#include "pool.h"
#include "simd_portable.h"

namespace dfk {

using DFK_ISA::code_at;
using DFK_ISA::half_to_float;

namespace {

int64_t group_of(Format f) { return f == Format::w6g ? 16 : 32; }

// The code of weight zero: what channels beyond n hold.
uint8_t zero_code(Format f, bool mins) {
  return f == Format::w8 || f == Format::w8g ? 128 : mins ? 0 : f == Format::w4g ? 8 : f == Format::w6g ? 32 : 0;
}

// One unit of four bytes (4 codes of w8, 2 of bf16, 1 of f32), changed by `flip`; `count` of its bytes exist.
inline void put_unit(const uint8_t* from, int64_t count, uint32_t flip, uint8_t* to) {
  uint32_t unit = 0;
  if (count >= 4) {
    std::memcpy(&unit, from, 4);
  } else {
    for (int64_t i = 0; i < count; ++i) reinterpret_cast<uint8_t*>(&unit)[i] = from[i];
  }
  unit ^= flip;
  std::memcpy(to, &unit, 4);
}

// Channels' rows of `bytes` -> [units][64], zero codes where a channel or input does not exist. A cache line of every
// channel at a time.
void interleave(const uint8_t* from, int64_t channels, int64_t bytes, uint32_t flip, uint8_t* to) {
  for (int64_t start = 0; start < bytes; start += 64) {
    const int64_t end = start + 64 < bytes ? start + 64 : bytes;
    for (int64_t c = 0; c < kPanel; ++c) {
      const uint8_t* row = from + c * bytes;
      if (c < channels && end < bytes) __builtin_prefetch(row + end);  // 64 rows are too many for the hardware to follow
      for (int64_t i = start; i < end; i += 4) {
        put_unit(row + i, c < channels ? bytes - i : 0, flip, to + (i / 4 * kPanel + c) * 4);
      }
    }
  }
}

// 8 inputs of the panel as nibbles: 256 bytes.
void nibbles(const uint8_t* from, int64_t channels, int64_t k, uint8_t zero, uint8_t* to) {
  for (int64_t c = 0; c < kPanel; ++c) {
    for (int64_t j = 0; j < 4; ++j, ++to) {
      const uint8_t low = c < channels ? from[c * k + j] : zero, high = c < channels ? from[c * k + 4 + j] : zero;
      *to = static_cast<uint8_t>((low & 15) | high << 4);
    }
  }
}

// The first `inputs` of k.
void pack_w4(const uint8_t* from, int64_t channels, int64_t k, int64_t inputs, uint8_t zero, uint8_t* to) {
  for (int64_t i = 0; i < inputs; i += 8, to += 256) nibbles(from + i, channels, k, zero, to);
}

void pack_w6(const uint8_t* from, int64_t channels, int64_t k, uint8_t zero, uint8_t* to) {
  for (int64_t i = 0; i < k; i += 16) {
    nibbles(from + i, channels, k, zero & 15, to);
    nibbles(from + i + 8, channels, k, zero & 15, to + 256);
    to += 512;
    for (int64_t c = 0; c < kPanel; ++c) {
      for (int64_t j = 0; j < 4; ++j, ++to) {
        int bits = 0;
        for (int64_t part = 0; part < 4; ++part) {
          const uint8_t code = c < channels ? from[c * k + i + 4 * part + j] : zero;
          bits |= (code >> 4 & 3) << (2 * part);
        }
        *to = static_cast<uint8_t>(bits);
      }
    }
  }
}

// Groups of 32 inputs with a byte a channel behind their nibbles; codes and bytes of 0 beyond: 0 times 1.
void pack_w4s(const uint8_t* from, const uint8_t* steps, int64_t channels, int64_t k, uint8_t* to) {
  for (int64_t g = 0; g < k / 32; ++g) {
    pack_w4(from + 32 * g, channels, k, 32, 0, to);
    to += 32 * kPanel / 2;
    for (int64_t c = 0; c < kPanel; ++c) *to++ = c < channels ? steps[c * (k / 32) + g] : 0;
  }
}

// [channels][groups] -> [groups][64], zeros beyond.
template <class T>
void pack_side(const T* from, int64_t channels, int64_t groups, T* to) {
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t c = 0; c < kPanel; ++c) *to++ = c < channels ? from[c * groups + g] : T{};
  }
}

size_t panel_bytes(Format f, int64_t k) {
  switch (f) {
    case Format::f32: return static_cast<size_t>(k * kPanel * 4);
    case Format::bf16: return static_cast<size_t>(round_up(k, 2) * kPanel * 2);
    case Format::w4g: return static_cast<size_t>(k * kPanel / 2);
    case Format::w6g: return static_cast<size_t>(k / 16 * 768);
    case Format::w4s: return static_cast<size_t>(k / 32 * kSteppedBytes);
    default: return static_cast<size_t>(round_up(k, 4) * kPanel);
  }
}

void weight_row(const Linear& w, int64_t id, float* out) {
  const int64_t panel = id / kPanel, channel = id % kPanel, k = w.k;
  const uint8_t* data = static_cast<const uint8_t*>(w.data) + static_cast<size_t>(panel) * panel_bytes(w.format, k);
  if (w.format == Format::f32) {
    for (int64_t i = 0; i < k; ++i) out[i] = reinterpret_cast<const float*>(data)[i * kPanel + channel];
    return;
  }
  if (w.format == Format::bf16) {
    const uint16_t* pairs = reinterpret_cast<const uint16_t*>(data);
    for (int64_t i = 0; i < k; ++i) {
      const uint32_t raw = static_cast<uint32_t>(pairs[(i / 2 * kPanel + channel) * 2 + i % 2]) << 16;
      std::memcpy(out + i, &raw, sizeof raw);
    }
    return;
  }
  if (w.format == Format::w8) {
    const float scale = static_cast<const float*>(w.scales)[id];
    for (int64_t i = 0; i < k; ++i) out[i] = static_cast<float>(code_at(w.format, data, channel, i) - 128) * scale;
    return;
  }
  if (w.format == Format::w4s) {
    const float scale = static_cast<const float*>(w.scales)[id];
    for (int64_t i = 0; i < k; ++i) {
      const uint8_t side = data[i / 32 * kSteppedBytes + 32 * kPanel / 2 + channel];
      const int code = (code_at(w.format, data, channel, i) - (side >> 4)) * ((side & 15) + 1);
      out[i] = static_cast<float>(static_cast<int8_t>(code)) * scale;
    }
    return;
  }
  const int64_t group = group_of(w.format), groups = k / group;
  const int zero = zero_code(w.format, w.mins != nullptr);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t at = (panel * groups + g) * kPanel + channel;
    const float scale = half_to_float(static_cast<const uint16_t*>(w.scales)[at]);
    const float least = w.mins ? half_to_float(w.mins[at]) : 0.0f;
    for (int64_t i = g * group; i < (g + 1) * group; ++i) {
      out[i] = static_cast<float>(code_at(w.format, data, channel, i) - zero) * scale - least;
    }
  }
}

}  // namespace

void pack(Format format, int64_t n, int64_t k, const void* codes, const void* scales, const uint16_t* mins, const uint8_t* steps,
          void* data, void* panel_scales, uint16_t* panel_mins) {
  const bool floats = format == Format::f32 || format == Format::bf16;
  const bool eight = format == Format::w8 || format == Format::w8g;
  const int64_t row = k * (format == Format::f32 ? 4 : format == Format::bf16 ? 2 : 1);  // bytes
  const bool per_row = format == Format::w8 || format == Format::w4s;
  const int64_t groups = per_row ? 1 : k / group_of(format);
  const uint8_t zero = zero_code(format, mins != nullptr);
  parallel((n + kPanel - 1) / kPanel, [&](int64_t panel, int) {
    const int64_t first = panel * kPanel, channels = n - first < kPanel ? n - first : kPanel;
    const int64_t from_side = first * groups, to_side = panel * groups * kPanel;
    const uint8_t* from = static_cast<const uint8_t*>(codes) + first * row;
    uint8_t* to = static_cast<uint8_t*>(data) + static_cast<size_t>(panel) * panel_bytes(format, k);
    if (floats || eight) interleave(from, channels, row, eight ? 0x80808080u : 0u, to);
    else if (format == Format::w4g) pack_w4(from, channels, k, k, zero, to);
    else if (format == Format::w4s) pack_w4s(from, steps + first * (k / 32), channels, k, to);
    else pack_w6(from, channels, k, zero, to);
    if (floats) return;
    if (per_row) {
      pack_side(static_cast<const float*>(scales) + from_side, channels, 1, static_cast<float*>(panel_scales) + to_side);
    } else {
      pack_side(static_cast<const uint16_t*>(scales) + from_side, channels, groups,
                static_cast<uint16_t*>(panel_scales) + to_side);
    }
    if (mins) pack_side(mins + from_side, channels, groups, panel_mins + to_side);
  });
}

void weight_rows(const Linear& w, const int64_t* ids, int64_t count, float* out) {
  constexpr int64_t step = 4;
  parallel((count + step - 1) / step, [&](int64_t task, int) {
    for (int64_t i = task * step; i < count && i < (task + 1) * step; ++i) weight_row(w, ids[i], out + i * w.k);
  });
}

}  // namespace dfk
