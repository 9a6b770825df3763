// Panels read number by number, in portable code. Included inside a translation unit's own namespace, after <cstring> and
// linear.h.

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  uint32_t bits;
  float value;
  if (exponent == 0) {
    value = static_cast<float>(fraction) * 0x1p-24f;  // zero and denormals
    std::memcpy(&bits, &value, sizeof bits);
    bits |= sign;
  } else {
    bits = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
  }
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Value i of a channel of a panel, codes only.
inline int code_at(Format f, const uint8_t* panel, int64_t channel, int64_t i) {
  if (f == Format::w8 || f == Format::w8g) return panel[i / 4 * 256 + channel * 4 + i % 4];
  const uint8_t* group = f == Format::w4g ? panel + i / 8 * 256 : panel + i / 16 * 768 + i % 16 / 8 * 256;
  const int low = group[channel * 4 + i % 4] >> (i % 8 / 4 * 4) & 15;
  if (f == Format::w4g) return low;
  const uint8_t high = panel[i / 16 * 768 + 512 + channel * 4 + i % 4];
  return low | (high >> (i % 16 / 4 * 2) & 3) << 4;
}
