// A weight matrix in natural order and in panels, and input rows prepared for it.
#pragma once

#include <cstdint>

#include "linear.h"
#include "numbers.h"

namespace driver {

// The kinds of weights that tiles treat differently. halves: whether w6g's two scales of 32 inputs differ everywhere, nowhere
// (as in what holds Q5_0), or in some slices of a panel.
enum class Halves { differ, same, mixed };

struct Kind {
  const char* name;
  dfk::Format format;
  bool mins = false;
  Halves halves = Halves::differ;
  bool exact() const { return format != dfk::Format::f32 && format != dfk::Format::bf16; }
  bool per_row() const { return dfk::act_kind(format) == dfk::ActKind::row8; }  // one scale a channel
  bool whole_groups() const { return group() > 0 || format == dfk::Format::w4s; }  // inputs come in groups of 32
  int64_t group() const {  // inputs that share a scale; 0: the whole row, or no scale
    if (format == dfk::Format::w6g) return 16;
    return format == dfk::Format::w8g || format == dfk::Format::w4g ? 32 : 0;
  }
};

constexpr Kind kKinds[] = {
    {"f32", dfk::Format::f32},
    {"bf16", dfk::Format::bf16},
    {"w8", dfk::Format::w8},
    {"w8g", dfk::Format::w8g},
    {"w4g", dfk::Format::w4g},
    {"w4g-mins", dfk::Format::w4g, true},
    {"w6g", dfk::Format::w6g},
    {"w6g-mins", dfk::Format::w6g, true},
    {"w6g-whole", dfk::Format::w6g, false, Halves::same},
    {"w6g-whole-mins", dfk::Format::w6g, true, Halves::same},
    {"w6g-mixed", dfk::Format::w6g, false, Halves::mixed},
    {"w4s", dfk::Format::w4s},
};

class Weights {
 public:
  Weights(const Kind& kind, int64_t n, int64_t k, Numbers& numbers, bool biased = false);

  dfk::Linear linear() const;

  int64_t panels() const { return (n + dfk::kPanel - 1) / dfk::kPanel; }
  int64_t groups() const { return kind.group() > 0 ? k / kind.group() : kind.exact() ? 1 : 0; }

  Kind kind;
  int64_t n, k;
  Array<uint8_t> codes;   // natural [n][k], of the format's width
  Array<float> row_scales;      // w8, w4s [n]
  Array<uint8_t> steps;         // w4s [n][k / 32]
  Array<uint16_t> scales, mins;  // float16 bits [n][groups]
  Array<float> bias;      // [n], or nothing
  Array<uint8_t> data;    // panels
  Array<float> panel_row_scales;
  Array<uint16_t> panel_scales, panel_mins;

 private:
  void draw(Numbers& numbers);
};

// Rows of inputs as a format wants them.
class Inputs {
 public:
  Inputs(dfk::ActKind kind, int64_t rows, int64_t k);
  // x [rows][ldx]; norm [k] or null.
  Inputs(dfk::ActKind kind, const float* x, int64_t ldx, int64_t rows, int64_t k, const float* norm = nullptr, float eps = 0.0f);

  dfk::Acts acts;

 private:
  Array<char> memory_;
};

}  // namespace driver
