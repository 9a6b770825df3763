// Tiles in portable C++; see linear_tiles.h. 32 inputs of the panel at a time are unpacked to signed 16-bit codes
// [32][64], which compilers turn into widening vector multiplications; all rows of the call then pass over them.

// Bytes of 32 inputs of a panel.
constexpr int64_t group_bytes(Format f) { return f == Format::w4g ? 1024 : f == Format::w6g ? 1536 : 2048; }

inline void halves(const uint16_t* p, float* out) {
  for (int c = 0; c < kPanel; ++c) out[c] = half_to_float(p[c]);
}

// `count` inputs (a multiple of 4, at most 32) of a panel from `data` on -> out [count][64], minus the format's offset.
inline void codes(Format format, const uint8_t* data, int count, int offset, int16_t* out) {
  for (int i = 0; i < count; ++i) {
    for (int c = 0; c < kPanel; ++c) out[i * kPanel + c] = static_cast<int16_t>(code_at(format, data, c, i) - offset);
  }
}

// sum [64] += codes [count][64] * x [count]
inline void add_products(const int16_t* w, const int8_t* x, int count, int32_t* sum) {
  for (int i = 0; i < count; ++i) {
    const int16_t code = x[i];
    for (int c = 0; c < kPanel; ++c) sum[c] += static_cast<int32_t>(w[i * kPanel + c]) * code;
  }
}

inline void w8(const Linear& w, const Acts& x, int64_t panel, int64_t row0, int64_t rows, float* tile, void* scratch) {
  const int64_t k4 = round_up(w.k, 4);
  const uint8_t* data = static_cast<const uint8_t*>(w.data) + panel * k4 * kPanel;
  int16_t* unpacked = static_cast<int16_t*>(scratch);
  for (int64_t i = 0; i < k4; i += 32) {
    const int count = static_cast<int>(k4 - i < 32 ? k4 - i : 32);
    codes(Format::w8, data + i * kPanel, count, 128, unpacked);
    for (int64_t r = 0; r < rows; ++r) {  // the sums wait in the tile's memory
      int32_t sum[kPanel] = {};
      if (i > 0) std::memcpy(sum, tile + r * kPanel, sizeof sum);
      add_products(unpacked, static_cast<const int8_t*>(x.data) + (row0 + r) * x.stride + i, count, sum);
      std::memcpy(tile + r * kPanel, sum, sizeof sum);
    }
  }
  scale_sums(w, x, panel, row0, rows, tile);
}

template <Format format>
void group(const Linear& w, const Acts& x, int64_t panel, int64_t row0, int64_t rows, float* tile, void* scratch) {
  constexpr int parts = format == Format::w6g ? 2 : 1, inputs = 32 / parts;
  const int offset = format == Format::w8g ? 128 : w.mins ? 0 : format == Format::w4g ? 8 : 32;
  const int64_t groups = w.k / 32, x_groups = x.stride / 32;
  int16_t* unpacked = static_cast<int16_t*>(scratch);
  float scale[parts * kPanel], low[parts * kPanel];
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t at = panel * groups + g;
    codes(format, static_cast<const uint8_t*>(w.data) + at * group_bytes(format), 32, offset, unpacked);
    for (int p = 0; p < parts; ++p) {
      halves(static_cast<const uint16_t*>(w.scales) + (at * parts + p) * kPanel, scale + p * kPanel);
      if (w.mins) halves(w.mins + (at * parts + p) * kPanel, low + p * kPanel);
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* y = tile + r * kPanel;
      if (g == 0) std::memset(y, 0, kPanel * sizeof(float));
      const int8_t* x_codes = static_cast<const int8_t*>(x.data) + (row0 + r) * x.stride + g * 32;
      const float x_scale = x.scales[(row0 + r) * x_groups + g];
      const int32_t* x_sums = x.sums + 2 * ((row0 + r) * x_groups + g);
      float part[kPanel] = {};
      for (int p = 0; p < parts; ++p) {
        int32_t sum[kPanel] = {};
        add_products(unpacked + p * inputs * kPanel, x_codes + p * inputs, inputs, sum);
        for (int c = 0; c < kPanel; ++c) part[c] += static_cast<float>(sum[c]) * scale[p * kPanel + c];
      }
      for (int c = 0; c < kPanel; ++c) y[c] += part[c] * x_scale;
      for (int p = 0; w.mins && p < parts; ++p) {
        const float weighted = x_scale * static_cast<float>(parts == 2 ? x_sums[p] : x_sums[0] + x_sums[1]);
        for (int c = 0; c < kPanel; ++c) y[c] -= low[p * kPanel + c] * weighted;
      }
    }
  }
}

inline void w8g(const Linear& w, const Acts& x, int64_t panel, int64_t row0, int64_t rows, float* tile, void* scratch) {
  group<Format::w8g>(w, x, panel, row0, rows, tile, scratch);
}

inline void w4g(const Linear& w, const Acts& x, int64_t panel, int64_t row0, int64_t rows, float* tile, void* scratch) {
  group<Format::w4g>(w, x, panel, row0, rows, tile, scratch);
}

inline void w6g(const Linear& w, const Acts& x, int64_t panel, int64_t row0, int64_t rows, float* tile, void* scratch) {
  group<Format::w6g>(w, x, panel, row0, rows, tile, scratch);
}
