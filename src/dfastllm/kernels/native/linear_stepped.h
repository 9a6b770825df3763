// Codes of w4s as the bytes of w8. A group of 32 inputs of a panel: 1024 bytes of nibbles as w4g has them, then 64 bytes, one
// a channel: its step less one in the low nibble, its zero in the high one. A weight is (code - zero) * step * scale of its
// channel, and (code - zero) * step fits a signed byte: so the integer loop of w8 does the rest, with nothing to pay for
// a group but this, once for all rows of a call (a step of 4 bits under the range of 8: QServe, Lin et al. 2024,
// arXiv 2405.04532). Codes that break the bound wrap around here and not everywhere: reading a file refuses them.
#pragma once

#include <cstdint>

#include "linear.h"
#include "linear_codes.h"
#include "simd.h"
#include "unroll.h"

namespace dfk::DFK_ISA::tiles {

struct Stepped {
  Codes16 factor, start;  // of 16 channels: offset - zero * step

  DFK_INLINE Stepped(const uint8_t* side, Codes16 offset) {
    const Codes16 both = four_of_each(side);
    factor = (both & codes16(15)) + codes16(1);
    start = offset - scaled(shift_right<4>(both) & codes16(15), factor);
  }

  Stepped() = default;

  // Register i of the group as w8 has it.
  DFK_INLINE Codes16 at(const uint8_t* group, int i) const { return scaled(Nibbles::at(group, i), factor) + start; }
};

// `groups` groups from `data` on as w8's, in scratch.
inline const uint8_t* unpack_stepped(const uint8_t* data, int64_t groups, void* scratch) {
  uint8_t* out = static_cast<uint8_t*>(scratch);
  for (int64_t g = 0; g < groups; ++g, data += kSteppedBytes, out += Bytes::bytes) {
    for (int c = 0; c < 4; ++c) {
      const Stepped stepped(data + Nibbles::bytes + 16 * c, codes16(-128));
      DFK_EACH(i, 8) store(out + 256 * i + 64 * c, stepped.at(data + 64 * c, i));
    }
  }
  return static_cast<const uint8_t*>(scratch);
}

}  // namespace dfk::DFK_ISA::tiles
