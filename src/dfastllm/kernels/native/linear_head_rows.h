// Reduces tiles of logits. Included inside a translation unit's own namespace, after simd.h.

// One panel's 64 logits of each row into parts[rows]. first_id: token of channel 0. check: look for NaN and infinity
// (otherwise someone else did, and excluded channels hold -inf). maxima [rows]: the panel's best logit per row.
inline void head_rows(const float* tile, int64_t rows, int32_t first_id, bool check, bool entropy, HeadPart* parts,
                      float* maxima) {
  const float none = -std::numeric_limits<float>::infinity();
  for (int64_t r = 0; r < rows; ++r, tile += kPanel) {
    HeadPart& part = parts[r];
    const F16 x[4] = {load(tile), load(tile + 16), load(tile + 32), load(tile + 48)};
    if (check) {
      const int32_t high = highest(max(max(abs_bits(x[0]), abs_bits(x[1])), max(abs_bits(x[2]), abs_bits(x[3]))));
      part.highest = part.highest > high ? part.highest : high;
    }
    const float best = highest(max(max(x[0], x[1]), max(x[2], x[3])));
    maxima[r] = best;
    if (!(best > none)) continue;  // nothing but excluded channels
    if (best > part.second) {      // rare once a few panels have gone by
      for (int32_t c = 0; c < kPanel; ++c) {
        if (tile[c] > part.best) {
          part.second = part.best;
          part.best = tile[c];
          part.token = first_id + c;
        } else if (tile[c] > part.second) {
          part.second = tile[c];
        }
      }
    }
    F16 sum = load(part.sum), weighted = load(part.weighted);
    if (best > part.shift) {
      if (part.shift > none) {
        const F16 lower = f16(part.shift - best), factor = exp(lower);
        weighted = factor * (weighted + max(lower, f16(-1000.0f)) * sum);
        sum = factor * sum;
      }
      part.shift = best;
    }
    const F16 shift = f16(part.shift);
    for (const F16& value : x) {
      const F16 below = max(value - shift, f16(-1000.0f));  // e^-1000 is 0, and 0 * -1000 is not NaN
      const F16 e = exp(below);
      sum = sum + e;
      if (entropy) weighted = weighted + e * below;
    }
    store(part.sum, sum);
    store(part.weighted, weighted);
  }
}
