// Packed codes read number by number.
#pragma once

#include <cstdint>

#include "isa_here.h"
#include "linear.h"

namespace dfk::DFK_ISA {

// Value i of a channel of a panel, codes only.
inline int code_at(Format f, const uint8_t* panel, int64_t channel, int64_t i) {
  if (f == Format::w8 || f == Format::w8g) return panel[i / 4 * 256 + channel * 4 + i % 4];
  if (f == Format::w4s) return code_at(Format::w4g, panel + i / 32 * kSteppedBytes, channel, i % 32);
  const uint8_t* group = f == Format::w4g ? panel + i / 8 * 256 : panel + i / 16 * 768 + i % 16 / 8 * 256;
  const int low = group[channel * 4 + i % 4] >> (i % 8 / 4 * 4) & 15;
  if (f == Format::w4g) return low;
  const uint8_t high = panel[i / 16 * 768 + 512 + channel * 4 + i % 4];
  return low | (high >> (i % 16 / 4 * 2) & 3) << 4;
}

}  // namespace dfk::DFK_ISA
