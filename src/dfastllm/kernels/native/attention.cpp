// How rotary, K,V writes and attention are cut into tasks, and which instruction set runs them.
#include "attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu.h"
#include "pool.h"
#include "scratch.h"

namespace dfk {

const AttentionOps& attention_ops() {
#if defined(DFK_X86)
  if (isa() == Isa::avx512) return attention_avx512;
  if (isa() != Isa::scalar) return attention_avx2;
#elif defined(DFK_ARM)
  if (isa() != Isa::scalar) return attention_neon;
#endif
  return attention_scalar;
}

KvLayer KvMemory::layer(int64_t i) const {
  const int64_t width = shape.type == KvType::f32 ? 4 : shape.type == KvType::bf16 ? 2 : 1;
  const int64_t bytes = i * blocks * shape.block_elements() * width, scales = i * blocks * shape.kv_heads * kBlock;
  KvLayer out{static_cast<char*>(first.k) + bytes, static_cast<char*>(first.v) + bytes, nullptr, nullptr};
  if (first.k_scales != nullptr) {
    out.k_scales = first.k_scales + scales;
    out.v_scales = first.v_scales + scales;
  }
  return out;
}

void rope_store(const RopeStore& a) {
  const AttentionOps& ops = attention_ops();
  const int64_t step = kBlock;  // rows of a block are mostly written by one thread: they share cache lines
  parallel((a.rows + step - 1) / step, [&](int64_t task, int) {
    for (int64_t row = task * step; row < std::min(a.rows, (task + 1) * step); ++row) ops.rope_store_row(a, row);
  });
}

namespace {

constexpr int64_t kFolded = 64;      // query rows x heads of a task: enough that K,V come from the near cache
constexpr int64_t kLeastFolded = 8;  // fewer would not fill a register tile
constexpr int64_t kInline = 200000;  // products that the calling thread does sooner than it wakes another

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The first range that any of the rows sees keys of.
int64_t first_range(const int32_t* from, int64_t first, int64_t last) {
  if (from == nullptr || first == last) return 0;
  return *std::min_element(from + first, from + last) / kRange;
}

int32_t highest(const int32_t* limit, int64_t first, int64_t last) {
  int32_t most = 0;
  for (int64_t i = first; i < last; ++i) most = std::max(most, limit[i]);
  return most;
}

// How spans are cut: query rows of a task, and how many K,V heads it takes at most.
struct Cut {
  int64_t rows, heads;
};

// All heads of a span whose rows are few: a task then reads K,V from end to end.
int64_t heads_of_task(const Attention& a, const Cut& cut, int64_t rows) {
  const int64_t most = std::clamp<int64_t>(rows, 1, cut.rows);  // a span may be empty
  const int64_t folded = most * (a.heads / a.shape.kv_heads);
  return std::clamp<int64_t>(kFolded / folded, 1, std::min(cut.heads, a.shape.kv_heads));
}

// Tasks, each range of keys being one.
int64_t pieces(const Attention& a, const Cut& cut) {
  int64_t out = 0;
  for (int64_t i = 0; i < a.span_count; ++i) {
    const SpanKeys& span = a.spans[i];
    const int64_t rows = span.row1 - span.row0, heads = heads_of_task(a, cut, rows);
    const int64_t ranges = ceil_div(span.cached, kRange) + ceil_div(span.own, kRange);
    out += ceil_div(rows, cut.rows) * ceil_div(a.shape.kv_heads, heads) * std::max<int64_t>(1, ranges);
  }
  return out;
}

// As many rows and heads as share K,V well, fewer where that would leave threads idle.
Cut cut_of(const Attention& a, int threads) {
  const int64_t group = a.heads / a.shape.kv_heads;
  int64_t longest = 1;
  for (int64_t i = 0; i < a.span_count; ++i) longest = std::max<int64_t>(longest, a.spans[i].row1 - a.spans[i].row0);
  Cut cut{std::min(longest, std::max<int64_t>(1, kFolded / group)), a.shape.kv_heads};
  while (threads > 1 && pieces(a, cut) < 3 * threads && cut.rows > 1 && cut.rows * group > kLeastFolded) {
    cut.rows = (cut.rows + 1) / 2;
  }
  while (threads > 1 && pieces(a, cut) < 2 * threads && cut.heads > 1) cut.heads = (cut.heads + 1) / 2;
  return cut;
}

// At most so many products of q and K: an upper bound is enough.
int64_t products(const Attention& a) {
  int64_t pairs = 0;
  for (int64_t i = 0; i < a.span_count; ++i) {
    const SpanKeys& span = a.spans[i];
    pairs += (span.row1 - span.row0) * (static_cast<int64_t>(span.cached) + span.own);
  }
  return pairs * a.heads * a.shape.dim;
}

void plan_tasks(const Attention& a, const Cut& cut, std::vector<AttendTask>& out) {
  out.clear();
  for (int64_t i = 0; i < a.span_count; ++i) {
    const SpanKeys& span = a.spans[i];
    const int64_t count = span.row1 - span.row0, chunks = ceil_div(count, cut.rows), heads = heads_of_task(a, cut, count);
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {  // causal: the last rows see most, so they come first
      const int64_t first = count * chunk / chunks, last = count * (chunk + 1) / chunks;
      const int64_t cached = ceil_div(highest(a.cached_limit + span.row0, first, last), kRange);
      const int64_t own = ceil_div(highest(a.own_limit + span.row0, first, last), kRange);
      const int64_t hidden = a.cached_from == nullptr ? 0 : first_range(a.cached_from + span.row0, first, last);
      for (int64_t head = 0; head < a.shape.kv_heads; head += heads) {
        const int64_t here = std::min(heads, a.shape.kv_heads - head);
        out.push_back({&span, head, here, first, last, std::min(hidden, cached), cached + own, cached, nullptr});
      }
    }
  }
}

// Floats of the partial results of a task's ranges, if it has several.
int64_t range_floats(const Attention& a, const AttendTask& task) {
  const int64_t ranges = task.range1 - task.range0, group = a.heads / a.shape.kv_heads;
  const int64_t folded = (task.last - task.first) * group * task.kv_heads;
  return ranges < 2 ? 0 : ranges * partial_floats(folded, a.shape.dim);
}

// Each range of the tasks that have several becomes a task with a partial result in `memory`; `whole` keeps what must be
// merged.
struct Split {
  std::vector<AttendTask> pieces, whole;
};

void split_ranges(const Attention& a, const std::vector<AttendTask>& tasks, float* memory, Split& out) {
  out.pieces.clear();
  out.whole.clear();
  for (const AttendTask& task : tasks) {
    const int64_t floats = range_floats(a, task);
    if (floats == 0) {
      out.pieces.push_back(task);
      continue;
    }
    out.whole.push_back(task);
    out.whole.back().partial = memory;
    for (int64_t range = task.range0; range < task.range1; ++range) {
      AttendTask piece = task;
      piece.range0 = range;
      piece.range1 = range + 1;
      piece.partial = memory;
      memory += floats / (task.range1 - task.range0);
      out.pieces.push_back(piece);
    }
  }
}

// Rows that no span covers.
void clear_padding(const Attention& a) {
  const int64_t width = a.heads * a.shape.dim;
  int64_t row = 0;
  const auto clear = [&](int64_t until) {
    if (until > row) std::memset(a.out + row * width, 0, static_cast<size_t>((until - row) * width) * sizeof(float));
  };
  for (int64_t i = 0; i < a.span_count; ++i) {
    clear(a.spans[i].row0);
    row = std::max<int64_t>(row, a.spans[i].row1);
  }
  clear(a.rows);
}

}  // namespace

void window_from(const SpanKeys* spans, int64_t count, const int32_t* positions, int64_t window, int32_t* cached_from,
                 int32_t* own_from) {
  for (int64_t i = 0; i < count; ++i) {
    for (int32_t row = spans[i].row0; row < spans[i].row1; ++row) {
      const int64_t first = positions[row] - window + 1;
      cached_from[row] = static_cast<int32_t>(std::max<int64_t>(0, first));
      own_from[row] = static_cast<int32_t>(std::max<int64_t>(0, first - spans[i].own_start));
    }
  }
}

void attention(const Attention& a) {
  static thread_local std::vector<AttendTask> tasks;
  static thread_local Split split;
  static thread_local Buffer scratch_memory, partial_memory;

  const AttentionOps& ops = attention_ops();
  const int threads = products(a) <= kInline ? 1 : thread_count();
  clear_padding(a);
  plan_tasks(a, cut_of(a, threads), tasks);
  if (tasks.empty()) return;
  size_t stride = 0;
  for (const AttendTask& task : tasks) {
    const int64_t of_head = (task.last - task.first) * (a.heads / a.shape.kv_heads);
    stride = std::max(stride, ops.scratch_bytes(task.kv_heads, of_head, a.shape.dim));
  }
  char* const scratch = static_cast<char*>(scratch_memory.bytes(stride * static_cast<size_t>(threads)));
  if (threads == 1) {
    for (const AttendTask& task : tasks) ops.attend(a, task, scratch);
    return;
  }
  const auto run = [&](const std::vector<AttendTask>& list, auto op) {
    parallel(static_cast<int64_t>(list.size()), [&](int64_t i, int worker) {
      op(a, list[static_cast<size_t>(i)], scratch + static_cast<size_t>(worker) * stride);
    });
  };
  // Too few tasks for the threads: long contexts are shared out by ranges of keys.
  int64_t floats = 0;
  for (const AttendTask& task : tasks) floats += range_floats(a, task);
  if (static_cast<int64_t>(tasks.size()) >= 2 * threads || floats == 0) return run(tasks, ops.attend);
  split_ranges(a, tasks, static_cast<float*>(partial_memory.bytes(static_cast<size_t>(floats) * sizeof(float))), split);
  run(split.pieces, ops.attend);
  run(split.whole, ops.merge);
}

}  // namespace dfk
