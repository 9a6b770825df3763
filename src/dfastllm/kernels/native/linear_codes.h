// Where a packed weight's codes come from, by format. at(p, i): inputs [4 i, 4 i + 4) of a group of 32 for 16 channels,
// as unsigned bytes; p: the group's data at the first of these channels.
//
//   offset   what was added to the signed code
//   parts    scales (and minima) that a group has for one channel
//   side     how many are stored for the panel's 64 channels
//   bytes    of a group of the panel
//   Unpacked the same codes after unpack_sixes
//   Whole    the same where both parts of every group have the same scale and minimum
#pragma once

#include <cstdint>
#include <cstring>

#include "linear.h"
#include "simd.h"
#include "unroll.h"

namespace dfk::DFK_ISA::tiles {

constexpr int kSlice = 8;  // groups of 32 inputs that all row blocks pass over before the next

struct Bytes {  // w8, w8g
  using Unpacked = Bytes;
  using Whole = Bytes;
#if defined(DFK_SIMD_SIGNED)  // codes below 128, those of the other formats, are the same signed
  static constexpr int offset = 0, parts = 1, side = kPanel, bytes = 2048;
  static DFK_INLINE Codes16 at(const uint8_t* p, int i) { return load_wide_codes(p + 256 * i); }
#else
  static constexpr int offset = 128, parts = 1, side = kPanel, bytes = 2048;
  static DFK_INLINE Codes16 at(const uint8_t* p, int i) { return load_codes(p + 256 * i); }
#endif
};

struct Nibbles {  // w4g
  using Unpacked = Nibbles;
  using Whole = Nibbles;
  static constexpr int offset = 8, parts = 1, side = kPanel, bytes = 1024;
  static DFK_INLINE Codes16 at(const uint8_t* p, int i) {
    const Codes16 both = load_codes(p + 256 * (i / 2));
    return (i % 2 ? shift_right<4>(both) : both) & codes16(15);
  }
};

// A byte a code. Two instructions a register are saved on every row block.
struct UnpackedSixes {
  static constexpr int offset = 32, parts = 2, side = 2 * kPanel, bytes = 2048;
  static DFK_INLINE Codes16 at(const uint8_t* p, int i) { return load_codes(p + 256 * i); }
};
struct UnpackedWhole : UnpackedSixes { static constexpr int parts = 1; };
struct WholeSixes;

struct Sixes {  // w6g
  using Unpacked = UnpackedSixes;
  using Whole = WholeSixes;
  static constexpr int offset = 32, parts = 2, side = 2 * kPanel, bytes = 1536;
  static DFK_INLINE Codes16 at(const uint8_t* p, int i) {
    p += 768 * (i / 4);
    const Codes16 both = load_codes(p + 256 * (i % 4 / 2));
    Codes16 high = load_codes(p + 512);
    if (i % 4 == 0) high = shift_left<4>(high);
    if (i % 4 == 1) high = shift_left<2>(high);
    if (i % 4 == 3) high = shift_right<2>(high);
    return masked_or(i % 2 ? shift_right<4>(both) : both, codes16(15), high & codes16(0x30));
  }
};
struct WholeSixes : Sixes {  // Q5_0 and other types with groups of 32, held as w6g
  using Unpacked = UnpackedWhole;
  static constexpr int parts = 1;
};

// `groups` groups of Sixes as UnpackedSixes, in scratch.
inline const uint8_t* unpack_sixes(const uint8_t* data, int64_t groups, void* scratch) {
  uint8_t* out = static_cast<uint8_t*>(scratch);
  for (int64_t g = 0; g < groups; ++g, data += Sixes::bytes, out += UnpackedSixes::bytes) {
    for (int c = 0; c < 4; ++c) {
      DFK_EACH(i, 8) store(out + 256 * i + 64 * c, Sixes::at(data + 64 * c, i));
    }
  }
  return static_cast<const uint8_t*>(scratch);
}

// Whether both parts of each group have the same values, of 64 channels.
inline bool equal_parts(const uint16_t* values, int64_t groups) {
  for (int64_t i = 0; i < groups; ++i, values += 2 * kPanel) {
    if (std::memcmp(values, values + kPanel, kPanel * sizeof(uint16_t)) != 0) return false;
  }
  return true;
}

}  // namespace dfk::DFK_ISA::tiles
