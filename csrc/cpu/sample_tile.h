// The sampler as the epilogue of a tile of logits: one row against kTile consecutive columns, reduced to a
// State. Lanes run along the columns, so nothing of a row depends on the rows beside it. Column c of the grid
// is the global id (vocab_start & ~3) + c: ids that share a Philox block (4) and tiles fall on the same ids
// in every call.
#pragma once

#include <math.h>

#include "common/gumbel.h"
#include "cpu/simd.h"

namespace esokern::cpu::ESOKERN_ISA {
namespace {

constexpr int kTile = 128;
constexpr int64_t kChunk = 4 * kTile;  // what a State covers before it merges: 99 for GPT-2's vocabulary
constexpr float kInfinity = __builtin_inff();
constexpr float kLargest = 3.4028234663852886e38f;

// What one row asks for.
struct Row {
  int64_t index;      // row of the call
  float temperature;  // of the draw; 0 = greedy
  float scale;        // of the statistics: 1, or 1 / temperature
  uint32_t key[2], position, step;
  // The filters kept the logits above threshold and those equal to it in columns <= last_tie.
  bool filtered;
  float threshold;
  int32_t last_tie;
};

// Which sums are needed; the same for all rows of a call.
struct Wanted {
  bool lse, entropy, second;
  bool filtered_statistics;  // of what the filters kept
};

// What is known about a row after some of its columns. States of adjacent ranges merge in ascending order.
struct State {
  float score = -kInfinity;  // of the best so far
  float logit = -kInfinity;
  int32_t column = -1;
  bool bad = false;        // NaN or +inf
  float top = -kInfinity;  // the two largest logits of the statistics' distribution
  float second = -kInfinity;
  float sum = 0.0f;       // of e^d, d = (logit - top) * scale
  float weighted = 0.0f;  // of d e^d
};

ESOKERN_INLINE VecI iota() {
  VecI v;
  for (int i = 0; i < kWidth; ++i) v[i] = i;
  return v;
}

ESOKERN_INLINE float fast_reduce_max(Vec v) {
#pragma GCC unroll 4
  for (int half = kWidth / 2; half > 0; half /= 2) v = max(v, __builtin_shuffle(v, iota() ^ splat(half)));
  return v[0];
}
ESOKERN_INLINE float fast_reduce_add(Vec v) {
#pragma GCC unroll 4
  for (int half = kWidth / 2; half > 0; half /= 2) v += __builtin_shuffle(v, iota() ^ splat(half));
  return v[0];
}

// e^((a - b) * scale) and its exponent for a <= b, finite for any two floats.
ESOKERN_INLINE Vec exponent(Vec a, Vec b, float scale) {
  return max((a - b) * splat(scale), splat(-200.0f));
}

inline void merge(State* state, const State& next, float scale) {
  if (next.score > state->score) {  // equal scores: the lower column, which is here already
    state->score = next.score;
    state->logit = next.logit;
    state->column = next.column;
  }
  state->bad = state->bad || next.bad;
  const bool rises = next.top > state->top;
  const float larger = rises ? next.top : state->top, smaller = rises ? state->top : next.top;
  const float old_second = rises ? next.second : state->second;
  if (next.sum > 0.0f) {
    const Vec d = exponent(splat(smaller), splat(larger), scale), e = exp(d);
    State* low = state;
    State copy = next;
    State* high = &copy;
    if (!rises) low = &copy, high = state;
    if (low->sum > 0.0f) {
      const float shift = d[0], factor = e[0];
      const float weighted = factor * (low->weighted + shift * low->sum);
      state->weighted = high->weighted + weighted;
      state->sum = high->sum + factor * low->sum;
    } else {
      state->weighted = high->weighted;
      state->sum = high->sum;
    }
  }
  state->top = larger;
  state->second = old_second > smaller ? old_second : smaller;
}

// The columns of a row that the filters kept, -inf elsewhere.
inline void keep_columns(const Row& row, const float* x, int64_t column, float* kept) {
  const int64_t ties = static_cast<int64_t>(row.last_tie) - column;
  const VecI last = splat(static_cast<int32_t>(ties < -1 ? -1 : ties > kTile ? kTile : ties));
#pragma GCC unroll 8
  for (int i = 0; i < kTile; i += kWidth) {
    const Vec v = load(x + i);
    const VecI tie = (v == splat(row.threshold)) & (iota() + splat(int32_t{i}) <= last);
    store(kept + i, select((v > splat(row.threshold)) | tie, v, splat(-kInfinity)));
  }
}

// Sums over the distribution; state->top is set.
inline void add_statistics(const float* x, float scale, const Wanted& wanted, State* state) {
  const Vec top = splat(state->top > -kLargest ? state->top : -kLargest);
  Vec sum = {}, weighted = {};
#pragma GCC unroll 8
  for (int i = 0; i < kTile; i += kWidth) {
    const Vec d = exponent(load(x + i), top, scale), e = exp(d);
    sum += e;
    weighted = fma(e, d, weighted);
  }
  state->sum = fast_reduce_add(sum);
  if (wanted.entropy) state->weighted = fast_reduce_add(weighted);
  if (!wanted.second) return;
  Vec first = splat(-kInfinity), second = splat(-kInfinity);
  for (int i = 0; i < kTile; i += kWidth) {
    const Vec v = load(x + i);
    second = max(second, min(first, v));
    first = max(first, v);
  }
  float lanes[2][kWidth], best = -kInfinity, runner_up = -kInfinity;
  store(lanes[0], first);
  store(lanes[1], second);
  for (int i = 0; i < 2 * kWidth; ++i) {
    const float v = lanes[i / kWidth][i % kWidth];
    if (v > best) {
      runner_up = best;
      best = v;
    } else if (v > runner_up) {
      runner_up = v;
    }
  }
  state->second = runner_up;
}

// Lane b of out[w]: element 4 b + w of the 4 kWidth at x.
ESOKERN_INLINE void load_by_four(const float* x, Vec* out) {
  const VecI even = iota() * splat(2), odd = even + splat(1);
  const Vec a = load(x), b = load(x + kWidth), c = load(x + 2 * kWidth), d = load(x + 3 * kWidth);
  const Vec even_low = __builtin_shuffle(a, b, even), even_high = __builtin_shuffle(c, d, even);
  const Vec odd_low = __builtin_shuffle(a, b, odd), odd_high = __builtin_shuffle(c, d, odd);
  out[0] = __builtin_shuffle(even_low, even_high, even);
  out[1] = __builtin_shuffle(odd_low, odd_high, even);
  out[2] = __builtin_shuffle(even_low, even_high, odd);
  out[3] = __builtin_shuffle(odd_low, odd_high, odd);
}

// The best score of the tile, if it is at least `floor`. top: no logit is larger; first_block: global id >> 2
// of column 0.
inline void draw(const Row& row, const float* x, int64_t column, uint32_t first_block, float top, float floor,
                 State* state) {
  Vec best = splat(-kInfinity);
  VecI where = splat(0);
  const bool noisy = row.temperature > 0.0f;
  if (!(top > -kInfinity) || (!noisy && top < floor)) return;
  const float exponent = noisy ? word_exponent(top, floor, row.temperature) : 0.0f;
  const VecU limit = splat(word_limit(exponent, exp(splat(exponent))[0]));
  if (limit[0] == 0) return;
  for (int i = 0; i < kTile; i += 4 * kWidth) {
    Vec score[4];
    if (noisy) {
      const VecU block = (VecU)iota() + splat(first_block + static_cast<uint32_t>((column + i) >> 2));
      const VecU position = splat(row.position), step = splat(row.step);
      const VecU key0 = splat(row.key[0]), key1 = splat(row.key[1]);
      const PhiloxWords<NoiseVec> words = philox4x32<NoiseVec>(block, position, step, splat(0u), key0, key1);
      if (!any((words.word[0] <= limit) | (words.word[1] <= limit) | (words.word[2] <= limit) |
               (words.word[3] <= limit)))
        continue;
      const Gumbel4<NoiseVec> noise = gumbel4<NoiseVec>(words, block, position, step, key0, key1);
      load_by_four(x + i, score);
#pragma GCC unroll 4
      for (int w = 0; w < 4; ++w) score[w] = score[w] + splat(row.temperature) * noise.value[w];
    } else {
      load_by_four(x + i, score);
    }
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w) {  // ascending columns per lane: the first of equal scores stays
      const VecI better = score[w] > best;
      best = better ? score[w] : best;
      where = better ? iota() * splat(4) + splat(int32_t{i + w}) : where;
    }
  }
  state->score = fast_reduce_max(best);
  if (!(state->score > -kInfinity)) return;
  int32_t lanes[kWidth], first = kTile;
  store(lanes, best == splat(state->score) ? where : splat(int32_t{kTile}));
  for (int i = 0; i < kWidth; ++i) first = lanes[i] < first ? lanes[i] : first;
  state->column = static_cast<int32_t>(column) + first;
  state->logit = x[first];
}

// The best score of a row that any thread has seen in this call. It only says what need not be looked at
// closely, so an old value costs time, never a bit of the result.
inline float read_floor(const float* floor) {
  float value;
  __atomic_load(floor, &value, __ATOMIC_RELAXED);
  return value;
}
inline void raise_floor(float* floor, float score) {
  if (score > read_floor(floor)) __atomic_store(floor, &score, __ATOMIC_RELAXED);
}

// The largest of kTile logits; false if one is NaN or +inf.
inline bool find_top(const float* x, float* top) {
  Vec best = splat(-kInfinity);
  VecI good = splat(-1);
#pragma GCC unroll 8
  for (int i = 0; i < kTile; i += kWidth) {
    const Vec v = load(x + i);
    best = max(best, v);
    good &= v <= splat(kLargest);
  }
  *top = fast_reduce_max(best);
  return !any(~good);
}

// What sample_tile does to top and sum at scale 1 without filters, and no draw.
inline void lse_tile(const float* x, State* state) {
  State tile;
  if (!find_top(x, &tile.top) || state->bad) {
    state->bad = true;
    return;
  }
  if (tile.top > -kInfinity)
    add_statistics(x, 1.0f, {.lse = true, .entropy = false, .second = false, .filtered_statistics = false},
                   &tile);
  merge(state, tile, 1.0f);
}

// One row, kTile columns from `column`; x is -inf where there is no id to draw.
inline void sample_tile(const Row& row, const float* x, int64_t column, uint32_t first_block,
                        const Wanted& wanted, float* floor, State* state) {
  State tile;
  if (!find_top(x, &tile.top) || state->bad) {
    state->bad = true;
    return;
  }
  float kept[kTile];
  const float* drawable = x;
  if (row.filtered) {
    keep_columns(row, x, column, kept);
    drawable = kept;
  }
  draw(row, drawable, column, first_block, tile.top, read_floor(floor), &tile);
  raise_floor(floor, tile.score);
  if (wanted.lse) {
    if (row.filtered && wanted.filtered_statistics) {
      Vec kept_top = splat(-kInfinity);
      for (int i = 0; i < kTile; i += kWidth) kept_top = max(kept_top, load(kept + i));
      tile.top = fast_reduce_max(kept_top);
      x = kept;
    }
    if (tile.top > -kInfinity) add_statistics(x, row.scale, wanted, &tile);
  }
  merge(state, tile, row.scale);
}

}  // namespace
}  // namespace esokern::cpu::ESOKERN_ISA
