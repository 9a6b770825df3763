// Statistics of the head's logits, reduced tile by tile. The vocabulary is cut into chunks of 16 panels, whatever the
// number of threads; a chunk's panels are reduced in order, and the chunks are merged in order, so a row's floats depend
// on its logits alone.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "best.h"
#include "linear.h"
#include "linear_head.h"
#include "pool.h"
#include "scratch.h"

namespace dfk {
namespace {

constexpr int64_t kChunk = 16;  // panels
constexpr int64_t kRows = 64;   // rows of a task
constexpr int64_t kTileRows = kChunk * kMostPaired;  // of the tiles that a task keeps: at least kRows

// What a chunk says of a row. sum is NaN if something is not finite.
struct ChunkPart {
  float sum, weighted, best, second;
  int32_t token;
};

struct Head {
  const Linear& w;
  const Acts& x;
  float cap;
  std::vector<int32_t> ban;  // ascending
  Barred barred;
  bool entropy;
  int64_t topk, chunks;
  std::unique_ptr<ChunkPart[]> parts;     // [chunks][rows]
  std::unique_ptr<HeadChoice[]> choices;  // [chunks][rows], if there are barred ids
  std::unique_ptr<Best[]> best;           // [rows], if topk > 0
};

// Sets what does not take part (banned, beyond n) to -inf, after looking whether what is banned is finite.
void exclude(const Head& head, int64_t first_id, int64_t channels, int64_t rows, float* tile, HeadPart* parts) {
  const auto from = std::lower_bound(head.ban.begin(), head.ban.end(), static_cast<int32_t>(first_id));
  for (int64_t r = 0; r < rows; ++r, tile += kPanel) {
    for (int64_t c = 0; c < channels; ++c) {
      parts[r].sum[0] += tile[c] * 0.0f;  // NaN where it is not finite
    }
    for (auto id = from; id != head.ban.end() && *id < first_id + channels; ++id) tile[*id - first_id] = kNone;
    std::fill(tile + channels, tile + kPanel, kNone);
  }
}

// The choices of rows [top, top + rows) after one more panel, of whose logits the highest of each row are known.
void choose(const Head& head, int64_t panel, int64_t top, int64_t rows, const float* tile, const float* maxima,
            HeadChoice* choices) {
  const int64_t panels = (head.w.n + kPanel - 1) / kPanel;
  for (int64_t r = 0; r < rows; ++r, tile += kPanel) {
    const int32_t set = head.barred.of_row[top + r];
    if (set < 0 || !(maxima[r] > choices[r].logit)) continue;  // rarely more than a few panels
    const uint64_t barred = head.barred.words[set * panels + panel];
    for (int64_t c = 0; c < kPanel; ++c) {
      if (tile[c] > choices[r].logit && !(barred >> c & 1)) choices[r] = {static_cast<int32_t>(panel * kPanel + c), tile[c]};
    }
  }
}

ChunkPart settle(const HeadPart& part) {
  float sum = 0, weighted = 0;
  for (int i = 0; i < 16; ++i) {
    sum += part.sum[i];
    weighted += part.weighted[i];
  }
  return {sum, weighted, part.best, part.second, part.token};
}

// What is known of rows [top, top + rows) while the panels of a chunk are reduced.
struct ChunkRows {
  const Head& head;
  int64_t top, rows;
  HeadPart* parts;
  float maxima[kRows];
  HeadChoice choices[kRows];

  // One more panel, in order. tile [rows][64]: its products.
  void add(int64_t panel, float* tile) {
    const Linear& w = head.w;
    const LinearOps& ops = linear_ops();
    const int64_t first_id = panel * kPanel, channels = std::min(kPanel, w.n - first_id);
    if (w.bias) ops.write_tile(tile, rows, channels, w.bias + first_id, tile, kPanel, false);
    if (head.cap > 0) ops.softcap(tile, rows * kPanel, head.cap);
    const auto banned = std::lower_bound(head.ban.begin(), head.ban.end(), static_cast<int32_t>(first_id));
    const bool whole = channels == kPanel && (banned == head.ban.end() || *banned >= first_id + kPanel);
    if (!whole) exclude(head, first_id, channels, rows, tile, parts);
    const bool bars = head.barred.words != nullptr;
    ops.head_rows(tile, rows, static_cast<int32_t>(first_id), whole, head.entropy, parts,
                  head.topk > 0 || bars ? maxima : nullptr);
    if (bars) choose(head, panel, top, rows, tile, maxima, choices);
    for (int64_t r = 0; head.topk > 0 && r < rows; ++r) {
      head.best[top + r].offer_panel(maxima[r], tile + r * kPanel, first_id);
    }
  }
};

// Rows [top, top + rows) of one chunk.
void reduce_chunk(Head& head, int64_t chunk, int64_t top, int64_t rows) {
  const Linear& w = head.w;
  const Tile tile = linear_ops().tile[static_cast<int>(w.format)];
  constexpr size_t part_bytes = kRows * sizeof(HeadPart), tile_bytes = kTileRows * kPanel * sizeof(float);
  char* memory = thread_scratch(kTileScratch + tile_bytes + part_bytes);
  float* const tiles = reinterpret_cast<float*>(memory + kTileScratch);
  ChunkRows of{head, top, rows, reinterpret_cast<HeadPart*>(memory + kTileScratch + tile_bytes), {}, {}};
  for (int64_t r = 0; r < rows; ++r) {
    of.parts[r] = {{}, {}, kNone, kNone, -1};
    of.choices[r] = {-1, kNone};
  }
  const int64_t panels = (w.n + kPanel - 1) / kPanel, first = chunk * kChunk, last = std::min(first + kChunk, panels);
  // Few rows: the first half of the chunk beside the second, whose tiles wait for their turn.
  const bool paired = rows <= linear_ops().paired_rows[static_cast<int>(w.format)];
  const int64_t pairs = paired ? (last - first) / 2 : 0, middle = last - pairs, size = rows * kPanel;
  for (int64_t p = 0; p < pairs; ++p) {
    float* const both = tiles + 2 * p * size;
    tile(w, head.x, {{first + p, middle + p}}, top, rows, both, memory);
    of.add(first + p, both);
  }
  for (int64_t panel = first + pairs; panel < middle; ++panel) {
    float* const one = tiles + 2 * pairs * size;
    tile(w, head.x, {{panel, -1}}, top, rows, one, memory);
    of.add(panel, one);
  }
  for (int64_t p = 0; p < pairs; ++p) of.add(middle + p, tiles + (2 * p + 1) * size);
  for (int64_t r = 0; r < rows; ++r) {
    head.parts[chunk * head.x.rows + top + r] = settle(of.parts[r]);
    if (head.barred.words) head.choices[chunk * head.x.rows + top + r] = of.choices[r];
  }
}

RowStats merge(const Head& head, int64_t row) {
  const auto part_of = [&](int64_t chunk) -> const ChunkPart& { return head.parts[chunk * head.x.rows + row]; };
  RowStats out{-1, 1, kNone, kNone, kNone, 0.0f};
  for (int64_t c = 0; c < head.chunks; ++c) {
    const ChunkPart& part = part_of(c);
    if (std::isnan(part.sum)) out.finite = 0;
    if (part.best > out.top) {
      out.second = std::max(out.top, part.second);
      out.top = part.best;
      out.token = part.token;
    } else {
      out.second = std::max(out.second, part.best);
    }
  }
  if (!out.finite) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    return {-1, 0, nan, nan, nan, head.entropy ? nan : 0.0f};
  }
  if (out.token < 0) return out;  // everything is banned
  double sum = 0, weighted = 0;
  for (int64_t c = 0; c < head.chunks; ++c) {
    const ChunkPart& part = part_of(c);
    if (part.token < 0) continue;
    const double lower = static_cast<double>(part.best) - out.top, factor = std::exp(lower);
    if (factor == 0) continue;
    sum += factor * part.sum;
    weighted += factor * (part.weighted + lower * part.sum);
  }
  const double log_sum = std::log(sum);
  out.norm = static_cast<float>(out.top + log_sum);
  if (head.entropy) out.entropy = static_cast<float>(std::max(0.0, log_sum - weighted / sum));
  return out;
}

// The choice of a row whose statistics are there.
HeadChoice merge_choice(const Head& head, int64_t row, const RowStats& stats) {
  if (!stats.finite || head.barred.of_row[row] < 0) return {stats.token, stats.top};
  HeadChoice out{-1, kNone};
  for (int64_t c = 0; c < head.chunks; ++c) {
    const HeadChoice& choice = head.choices[c * head.x.rows + row];
    if (choice.logit > out.logit) out = choice;
  }
  return out;
}

}  // namespace

void head_stats(const Linear& w, const Acts& x, float cap, const int32_t* ban, int64_t bans, const Barred& barred,
                bool entropy, int64_t topk, RowStats* out, float* top_values, int32_t* top_ids) {
  const int64_t rows = x.rows, panels = (w.n + kPanel - 1) / kPanel, chunks = (panels + kChunk - 1) / kChunk;
  if (rows <= 0) return;
  Head head{w, x, cap, std::vector<int32_t>(ban, ban + bans), barred, entropy, topk, chunks, nullptr, nullptr, nullptr};
  std::sort(head.ban.begin(), head.ban.end());
  head.parts.reset(new ChunkPart[static_cast<size_t>(chunks * rows)]);
  if (barred.words) head.choices.reset(new HeadChoice[static_cast<size_t>(chunks * rows)]);
  if (topk > 0) head.best.reset(new Best[static_cast<size_t>(rows)]);
  for (int64_t r = 0; topk > 0 && r < rows; ++r) {
    head.best[r].values = top_values + r * topk;
    head.best[r].ids = top_ids + r * topk;
    head.best[r].room = topk;
  }
  const int64_t down = (rows + kRows - 1) / kRows;  // the tasks of a chunk are neighbours: its weights stay in the cache
  parallel(chunks * down, [&](int64_t task, int) {
    const int64_t top = task % down * kRows;
    reduce_chunk(head, task / down, top, std::min(kRows, rows - top));
  });
  auto finish = [&](int64_t row, int) {
    out[row] = merge(head, row);
    if (barred.words) barred.out[row] = merge_choice(head, row, out[row]);
    if (topk > 0) head.best[row].finish(out[row].finite);
  };
  if (rows * chunks < 4096) {
    for (int64_t row = 0; row < rows; ++row) finish(row, 0);
  } else {
    parallel(rows, finish);
  }
}

}  // namespace dfk
