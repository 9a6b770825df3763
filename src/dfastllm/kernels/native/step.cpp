// Reading a step, see step.h.
#include "step.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace dfk {
namespace {

// The header and the words of a span, as kernels/step.py writes them.
enum Header { kMagic, kRows, kSpans, kBlocks, kOwnBlocks, kWanted, kMaskWords, kBlockSize, kHeaderWords = 16 };
enum SpanWords { kRow0, kRow1, kCached, kOwn, kBlock0, kOwnBlock0, kOwnStart, kMaskAt, kSpanWords };
constexpr int32_t kStepMagic = 0x53544531;  // "STE1"
constexpr int kRowArrays = 7;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("the step " + what + "."); }

std::string number(int64_t x) { return std::to_string(x); }

Extent extent(const int32_t* values, int64_t count) {
  if (count == 0) return {};
  const auto [low, high] = std::minmax_element(values, values + count);
  return {*low, *high};
}

// In [least, end), as kernels/step.py says it.
void require_within(const Extent& x, const char* name, int64_t least, int64_t end) {
  if (x.most < x.least || (x.least >= least && x.most < std::max(end, least + 1))) return;
  throw std::invalid_argument(std::string(name) + " of the step must be from " + number(least) + " to " + number(end - 1) +
                              ", got " + number(x.least) + " to " + number(x.most) + ".");
}

void require_limit(const int32_t* limit, const SpanKeys& span, int64_t keys, int64_t index, const char* name) {
  for (int32_t row = span.row0; row < span.row1; ++row) {
    if (limit[row] < 0 || limit[row] > keys) {
      throw std::invalid_argument("a row of span " + number(index) + " sees " + number(limit[row]) + " of " + number(keys) +
                                  " " + name + " keys.");
    }
  }
}

}  // namespace

Step read_step(const int32_t* words, int64_t count) {
  if (count < kHeaderWords || words[kMagic] != kStepMagic) refuse("is of another version, or no step at all");
  const int64_t rows = words[kRows], spans = words[kSpans], blocks = words[kBlocks], own_blocks = words[kOwnBlocks];
  const int64_t wanted = words[kWanted], mask_words = words[kMaskWords];
  if (std::min({rows, spans, blocks, own_blocks, wanted, mask_words}) < 0) refuse("has a negative count");
  const int64_t need = kHeaderWords + kRowArrays * rows + wanted + kSpanWords * spans + blocks + own_blocks + mask_words;
  if (count != need) refuse("is cut or too long: " + number(count) + " words, wanted " + number(need));
  if (words[kBlockSize] != kBlock) {
    refuse("has blocks of " + number(words[kBlockSize]) + " positions; these kernels take " + number(kBlock));
  }

  Step out;
  out.rows = rows;
  out.wanted = wanted;
  const int32_t* at = words + kHeaderWords;
  const auto take = [&at](int64_t length) {
    const int32_t* const start = at;
    at += length;
    return start;
  };
  out.ids = take(rows);
  out.positions = take(rows);
  out.slot = take(rows);
  out.own_slot = take(rows);
  out.cached_limit = take(rows);
  out.own_limit = take(rows);
  out.adapter = take(rows);
  out.want = take(wanted);
  const int32_t* const facts = take(kSpanWords * spans);
  const int32_t* const block_table = take(blocks);
  const int32_t* const own_table = take(own_blocks);
  const auto* const mask = reinterpret_cast<const uint8_t*>(take(mask_words));

  constexpr int64_t any = int64_t{1} << 31;
  out.id = extent(out.ids, rows);
  out.slot_extent = extent(out.slot, rows);
  out.own_slot_extent = extent(out.own_slot, rows);
  out.block = extent(block_table, blocks);
  out.own_block = extent(own_table, own_blocks);
  require_within(out.id, "ids", 0, any);
  require_within(extent(out.positions, rows), "positions", 0, any);
  require_within(extent(out.want, wanted), "want", 0, rows);
  const Extent adapters = extent(out.adapter, rows);
  require_within(adapters, "adapter", 0, any);
  out.adapted = adapters.most > 0;

  out.spans.resize(static_cast<size_t>(spans));
  int64_t before = 0;
  for (int64_t i = 0; i < spans; ++i) {
    const int32_t* const s = facts + kSpanWords * i;
    if (s[kRow0] < before || s[kRow1] < s[kRow0] || s[kRow1] > rows) {
      throw std::invalid_argument("span " + number(i) + " has rows " + number(s[kRow0]) + " to " + number(s[kRow1]) +
                                  ", wanted in order within " + number(rows) + ".");
    }
    before = s[kRow1];
    const int64_t cached = s[kCached], own = s[kOwn];
    if (cached < 0 || own < 0 || s[kBlock0] < 0 || s[kOwnBlock0] < 0 || s[kBlock0] + (cached + kBlock - 1) / kBlock > blocks ||
        s[kOwnBlock0] + (own + kBlock - 1) / kBlock > own_blocks) {
      throw std::invalid_argument("span " + number(i) + " has " + number(cached) + " cached keys and " + number(own) +
                                  " own keys, but not the blocks for them.");
    }
    const int64_t area = (before - s[kRow0]) * (cached + own);
    if (s[kMaskAt] >= 0 && s[kMaskAt] + area > 4 * mask_words) {
      throw std::invalid_argument("the mask of span " + number(i) + " is too short.");
    }
    SpanKeys& span = out.spans[static_cast<size_t>(i)];
    span = {s[kRow0], s[kRow1], s[kCached], s[kOwn], block_table + s[kBlock0], own_table + s[kOwnBlock0],
            s[kMaskAt] < 0 ? nullptr : mask + s[kMaskAt], s[kOwnStart]};
    require_limit(out.cached_limit, span, cached, i, "cached");
    require_limit(out.own_limit, span, own, i, "own");
  }
  return out;
}

void require_blocks(const Step& step, int64_t cache_blocks, int64_t own_blocks) {
  require_within(step.slot_extent, "slot", -1, cache_blocks * kBlock);
  require_within(step.own_slot_extent, "own_slot", -1, own_blocks * kBlock);
  require_within(step.block, "blocks", 0, cache_blocks);
  require_within(step.own_block, "own_blocks", 0, own_blocks);
}

}  // namespace dfk
