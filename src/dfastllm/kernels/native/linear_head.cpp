// Statistics of the head's logits, reduced tile by tile. The vocabulary is cut into chunks of 16 panels, whatever the
// number of threads; a chunk's panels are reduced in order, and the chunks are merged in order, so a row's floats depend
// on its logits alone.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "linear.h"
#include "linear_head.h"
#include "pool.h"
#include "scratch.h"

namespace dfk {
namespace {

constexpr int64_t kChunk = 16;  // panels
constexpr int64_t kRows = 64;   // rows of a task
constexpr float kNone = -std::numeric_limits<float>::infinity();

// A chunk's or a row's candidates, best first.
struct Best {
  float* values;
  int32_t* ids;
  int64_t room, count;

  // Ids come in ascending order, so a tie goes behind.
  void offer(float value, int32_t id) {
    if (count == room && !(value > values[room - 1])) return;
    int64_t at = count < room ? count++ : room - 1;
    for (; at > 0 && value > values[at - 1]; --at) {
      values[at] = values[at - 1];
      ids[at] = ids[at - 1];
    }
    values[at] = value;
    ids[at] = id;
  }
};

// What a chunk says of a row. sum is NaN if something is not finite.
struct ChunkPart {
  float sum, weighted, best, second;
  int32_t token;
};

struct Head {
  const Linear& w;
  const Acts& x;
  std::vector<int32_t> ban;  // ascending
  bool entropy;
  int64_t topk, chunks;
  std::unique_ptr<ChunkPart[]> parts;           // [chunks][rows]
  std::unique_ptr<float[]> values;              // [chunks][rows][topk]
  std::unique_ptr<int32_t[]> ids, counts;       // [chunks][rows][topk], [chunks][rows]
  std::unique_ptr<std::atomic<float>[]> least;  // [rows]: at least topk logits of the row are no lower than this
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

void offer_panel(Head& head, int64_t row, float highest, const float* logits, int64_t first_id, Best& best) {
  const float least = head.least[row].load(std::memory_order_relaxed);
  if (!(highest >= least) || highest == kNone) return;
  if (best.count == best.room && !(highest > best.values[best.room - 1])) return;
  for (int64_t c = 0; c < kPanel; ++c) {
    if (logits[c] >= least && logits[c] > kNone) best.offer(logits[c], static_cast<int32_t>(first_id + c));
  }
  if (best.count < best.room) return;
  // Other chunks need not look at what is lower than this one's last. Which of them still did changes nothing.
  float seen = head.least[row].load(std::memory_order_relaxed);
  const float last = best.values[best.room - 1];
  while (last > seen && !head.least[row].compare_exchange_weak(seen, last, std::memory_order_relaxed)) {
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

// Rows [top, top + rows) of one chunk.
void reduce_chunk(Head& head, int64_t chunk, int64_t top, int64_t rows) {
  const Linear& w = head.w;
  const LinearOps& ops = linear_ops();
  constexpr size_t part_bytes = kRows * sizeof(HeadPart), tile_bytes = kRows * kPanel * sizeof(float);
  char* memory = thread_scratch(kTileScratch + tile_bytes + part_bytes);
  float* tile = reinterpret_cast<float*>(memory + kTileScratch);
  HeadPart* parts = reinterpret_cast<HeadPart*>(memory + kTileScratch + tile_bytes);
  float maxima[kRows];
  Best best[kRows];
  for (int64_t r = 0; r < rows; ++r) {
    parts[r] = {{}, {}, kNone, kNone, -1};
    const int64_t at = (chunk * head.x.rows + top + r) * head.topk;
    best[r] = {head.values.get() + at, head.ids.get() + at, head.topk, 0};
  }
  const int64_t panels = (w.n + kPanel - 1) / kPanel, last = std::min((chunk + 1) * kChunk, panels);
  for (int64_t panel = chunk * kChunk; panel < last; ++panel) {
    const int64_t first_id = panel * kPanel, channels = std::min(kPanel, w.n - first_id);
    ops.tile[static_cast<int>(w.format)](w, head.x, panel, top, rows, tile, memory);
    if (w.bias) ops.write_tile(tile, rows, channels, w.bias + first_id, tile, kPanel, false);
    const auto banned = std::lower_bound(head.ban.begin(), head.ban.end(), static_cast<int32_t>(first_id));
    const bool whole = channels == kPanel && (banned == head.ban.end() || *banned >= first_id + kPanel);
    if (!whole) exclude(head, first_id, channels, rows, tile, parts);
    ops.head_rows(tile, rows, static_cast<int32_t>(first_id), whole, head.entropy, parts,
                  head.topk > 0 ? maxima : nullptr);
    for (int64_t r = 0; head.topk > 0 && r < rows; ++r) {
      offer_panel(head, top + r, maxima[r], tile + r * kPanel, first_id, best[r]);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = chunk * head.x.rows + top + r;
    head.parts[at] = settle(parts[r]);
    if (head.topk > 0) head.counts[at] = static_cast<int32_t>(best[r].count);
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

void merge_best(const Head& head, int64_t row, bool finite, float* values, int32_t* ids) {
  Best best{values, ids, head.topk, 0};
  for (int64_t c = 0; finite && c < head.chunks; ++c) {
    const int64_t at = c * head.x.rows + row;
    for (int32_t i = 0; i < head.counts[at]; ++i) {
      best.offer(head.values[at * head.topk + i], head.ids[at * head.topk + i]);
    }
  }
  std::fill(values + best.count, values + head.topk, finite ? kNone : std::numeric_limits<float>::quiet_NaN());
  std::fill(ids + best.count, ids + head.topk, -1);
}

}  // namespace

void head_stats(const Linear& w, const Acts& x, const int32_t* ban, int64_t bans, bool entropy, int64_t topk,
                RowStats* out, float* top_values, int32_t* top_ids) {
  const int64_t rows = x.rows, panels = (w.n + kPanel - 1) / kPanel, chunks = (panels + kChunk - 1) / kChunk;
  if (rows <= 0) return;
  Head head{w, x, std::vector<int32_t>(ban, ban + bans), entropy, topk, chunks, nullptr, nullptr, nullptr, nullptr, nullptr};
  std::sort(head.ban.begin(), head.ban.end());
  head.parts.reset(new ChunkPart[static_cast<size_t>(chunks * rows)]);
  if (topk > 0) {
    head.values.reset(new float[static_cast<size_t>(chunks * rows * topk)]);
    head.ids.reset(new int32_t[static_cast<size_t>(chunks * rows * topk)]);
    head.counts.reset(new int32_t[static_cast<size_t>(chunks * rows)]);
    head.least.reset(new std::atomic<float>[static_cast<size_t>(rows)]);
    for (int64_t r = 0; r < rows; ++r) head.least[r].store(kNone, std::memory_order_relaxed);
  }
  const int64_t down = (rows + kRows - 1) / kRows;  // the tasks of a chunk are neighbours: its weights stay in the cache
  parallel(chunks * down, [&](int64_t task, int) {
    const int64_t top = task % down * kRows;
    reduce_chunk(head, task / down, top, std::min(kRows, rows - top));
  });
  auto finish = [&](int64_t row, int) {
    out[row] = merge(head, row);
    if (topk > 0) merge_best(head, row, out[row].finite, top_values + row * topk, top_ids + row * topk);
  };
  if (rows * chunks * (1 + topk) < 4096) {
    for (int64_t row = 0; row < rows; ++row) finish(row, 0);
  } else {
    parallel(rows, finish);
  }
}

}  // namespace dfk
