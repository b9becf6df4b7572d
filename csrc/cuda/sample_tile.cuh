// The sampler as the epilogue of a tile of logits: rows against kTile consecutive columns, reduced to a State each.
// Work: 8 lanes share a row; lane p of them has the columns 32 i + 4 p + {0, 1, 2, 3}, i < 4, so one Philox call serves
//   four of its columns and the result of a row depends on nothing but its logits.
// Memory: a tile in shared memory as [4 slices of 32 columns][kLines rows] lines of 128 bytes, their chunks of 16
//   bytes swizzled: both the fragments of a GEMM and the reads here go through without bank conflicts.
#pragma once

#include "cuda/float4.cuh"
#include "cuda/sample_state.cuh"

namespace esokern::cuda {
namespace {

constexpr int kTile = 128;
constexpr int kRowLanes = 8;

inline Columns make_columns(int64_t vocab, int64_t vocab_start, int64_t mask_id, float softcap) {
  const int64_t shift = vocab_start & 3;
  const bool has_mask = mask_id >= vocab_start && mask_id < vocab_start + vocab;
  return {.vocab = vocab,
          .columns = (shift + vocab + kTile - 1) / kTile * kTile,
          .shift = shift,
          .mask_column = has_mask ? mask_id - vocab_start + shift : -1,
          .softcap = softcap};
}

template <int kLines>
struct LogitsTile {
  static constexpr int kBytes = kLines * kTile * 4;
  unsigned char* base;

  // Columns 32 slice + 4 chunk + {0, 1, 2, 3} of a row.
  __device__ __forceinline__ Float4* at(int line, int slice, int chunk) const {
    return reinterpret_cast<Float4*>(base + ((slice * kLines + line) * 8 + (chunk ^ (line % 8))) * 16);
  }
};

// Softcap, and -inf where there is no id to draw: on the lane's own columns.
template <int kLines>
__device__ __forceinline__ void finish_logits(const Columns& p, LogitsTile<kLines> tile, int line,
                                              int64_t column) {
  const int64_t end = p.shift + p.vocab;
  const bool inside = column >= p.shift && column + kTile <= end;
  const bool has_mask = p.mask_column >= column && p.mask_column < column + kTile;
  if (inside && !has_mask && !(p.softcap > 0.0f)) return;
  const int chunk = threadIdx.x % kRowLanes;
#pragma unroll 1
  for (int slice = 0; slice < 4; ++slice) {
    Float4 x = *tile.at(line, slice, chunk);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int64_t at = column + 32 * slice + 4 * chunk + c;
      if (p.softcap > 0.0f) x.value[c] = p.softcap * tanhf(x.value[c] / p.softcap);
      if (at < p.shift || at >= end || at == p.mask_column) x.value[c] = -kInfinity;
    }
    *tile.at(line, slice, chunk) = x;
  }
}

// -inf for what the filters did not keep.
__device__ __forceinline__ Float4 keep(Float4 x, const Row& row, int64_t column) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const bool kept =
        x.value[c] > row.threshold || (x.value[c] == row.threshold && column + c <= row.last_tie);
    x.value[c] = kept ? x.value[c] : -kInfinity;
  }
  return x;
}

template <class Reduce>
__device__ __forceinline__ float reduce_row(float x, const Reduce& reduce) {
#pragma unroll
  for (int lanes = 1; lanes < kRowLanes; lanes *= 2) x = reduce(x, shfl_xor(x, lanes));
  return x;
}

// Is one of the row's logits NaN or +inf? From the lane's own.
__device__ __forceinline__ bool is_bad(const Float4 (&x)[4]) {
  bool good = true;
#pragma unroll
  for (int i = 0; i < 16; ++i) good = good && x[i / 4].value[i % 4] <= kLargest;
  const int row = threadIdx.x % kWarpSize / kRowLanes * kRowLanes;
  return (ballot(!good) >> row & 0xffu) != 0;
}

// Of the row, from the lane's logits; weighted as in State, unless it is null.
__device__ __forceinline__ LogSum log_sum(const Float4 (&x)[4], float scale, float* weighted) {
  const auto larger = [](float a, float b) { return fmaxf(a, b); };
  const auto plus = [](float a, float b) { return a + b; };
  float first = -kInfinity;
#pragma unroll
  for (int i = 0; i < 16; ++i) first = fmaxf(first, x[i / 4].value[i % 4]);
  LogSum total;
  total.top = reduce_row(first, larger);
  const float top = fmaxf(total.top, -kLargest);
  float sum = 0.0f, sum_of_products = 0.0f;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float d = binary_exponent(x[i / 4].value[i % 4], top, scale), e = exp2_fast(d);
    sum += e;
    sum_of_products += d * e;
  }
  total.sum = reduce_row(sum, plus);
  if (weighted != nullptr) *weighted = reduce_row(sum_of_products, plus);
  return total;
}

// Sets total and weighted, and second if it is wanted, from the lane's logits.
__device__ __forceinline__ void add_statistics(const SampleProblem& p, const Float4 (&x)[4], float scale,
                                               State* state) {
  state->total = log_sum(x, scale, &state->weighted);
  if (!p.wants_second) return;
  float first = -kInfinity, second = -kInfinity;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float v = x[i / 4].value[i % 4];
    second = fmaxf(second, fminf(first, v));
    first = fmaxf(first, v);
  }
#pragma unroll
  for (int lanes = 1; lanes < kRowLanes; lanes *= 2) {
    const float other_first = shfl_xor(first, lanes), other_second = shfl_xor(second, lanes);
    second = fmaxf(fmaxf(second, other_second), fminf(first, other_first));
    first = fmaxf(first, other_first);
  }
  state->second = second;
}

// The best score among the lane's columns, if it is at least `floor`; top: its largest logit that may be drawn.
template <int kLines>
__device__ __forceinline__ void draw(const SampleProblem& p, const Row& row, LogitsTile<kLines> tile,
                                     int line, int64_t column, float top, float floor, State* state) {
  const bool noisy = row.temperature > 0.0f;
  if (!(top > -kInfinity) || (!noisy && top < floor)) return;
  uint32_t limit = UINT32_MAX;
  if (noisy) {
    const float exponent = word_exponent(top, floor, row.temperature);
    limit = word_limit(exponent, exp2_fast(exponent * kLog2E));
    if (limit == 0) return;
  }
  const int chunk = threadIdx.x % kRowLanes;
#pragma unroll 1
  for (int slice = 0; slice < 4; ++slice) {
    const int64_t at = column + 32 * slice + 4 * chunk;
    Gumbel4<Scalar> noise = {};
    if (noisy) {
      const uint32_t block = p.first_block + static_cast<uint32_t>(at >> 2);
      const PhiloxWords<Scalar> words =
          philox4x32<Scalar>(block, row.position, row.step, 0u, row.key[0], row.key[1]);
      if (words.word[0] > limit && words.word[1] > limit && words.word[2] > limit && words.word[3] > limit)
        continue;
      noise = gumbel4<Scalar>(words, block, row.position, row.step, row.key[0], row.key[1]);
    }
    Float4 x = *tile.at(line, slice, chunk);
    if (p.filtered) x = keep(x, row, at);
#pragma unroll
    for (int c = 0; c < 4; ++c) {  // ascending columns: the first of equal scores stays
      const float score =
          noisy ? Scalar::add(x.value[c], Scalar::mul(row.temperature, noise.value[c])) : x.value[c];
      if (score > state->score) {
        state->score = score;
        state->logit = x.value[c];
        state->column = static_cast<int32_t>(at) + c;
      }
    }
  }
}

// One row of the tile that begins at `column`, by the 8 lanes that share it; called by whole warps. All lanes of the
// row get the state.
template <int kLines>
__device__ __forceinline__ State sample_tile(const SampleProblem& p, const Row& row, LogitsTile<kLines> tile,
                                             int line, int64_t column, float floor) {
  const int chunk = threadIdx.x % kRowLanes;
  State state;
  float top = -kInfinity;
  {
    Float4 x[4];
#pragma unroll
    for (int slice = 0; slice < 4; ++slice) x[slice] = *tile.at(line, slice, chunk);
    state.bad = is_bad(x);
#pragma unroll
    for (int slice = 0; slice < 4; ++slice) {
      Float4 drawable = x[slice];
      if (p.filtered) {
        drawable = keep(drawable, row, column + 32 * slice + 4 * chunk);
        if (p.filtered_statistics) x[slice] = drawable;
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) top = fmaxf(top, drawable.value[c]);
    }
    if (p.wants_lse) add_statistics(p, x, row.scale, &state);
  }
  if (!state.bad) draw(p, row, tile, line, column, top, floor, &state);
  if (ballot(state.score > -kInfinity) != 0) {
#pragma unroll
    for (int lanes = 1; lanes < kRowLanes; lanes *= 2) {
      const float score = shfl_xor(state.score, lanes), logit = shfl_xor(state.logit, lanes);
      const int32_t at = shfl_xor(state.column, lanes);
      const bool better = score > state.score || (score == state.score && at < state.column);
      state.score = better ? score : state.score;
      state.logit = better ? logit : state.logit;
      state.column = better ? at : state.column;
    }
  }
  return state;
}

// What becomes of one row of a tile of raw logits, by the 8 lanes that share it; called by whole warps. Lanes of a slot
// behind the last one take part and leave nothing.
template <int kLines>
__device__ __forceinline__ void finish_tile(const SampleProblem& p, const Row& row, float floor, bool in_use,
                                            LogitsTile<kLines> tile, int line, int64_t slot, int64_t column) {
  const int chunk = threadIdx.x % kRowLanes;
  finish_logits(p, tile, line, column);
  if (p.logits != nullptr) {
    float top = -kInfinity;
#pragma unroll
    for (int slice = 0; slice < 4; ++slice) {
      const Float4 x = *tile.at(line, slice, chunk);
      if (in_use)
        *reinterpret_cast<Float4*>(p.logits + slot * p.columns + column + 32 * slice + 4 * chunk) = x;
#pragma unroll
      for (int c = 0; c < 4; ++c) top = x.value[c] <= kLargest ? fmaxf(top, x.value[c]) : kInfinity;
    }
    top = reduce_row(top, [](float a, float b) { return fmaxf(a, b); });
    if (in_use && chunk == 0) atomic_max(p.tops + slot, float_order(top));
    return;
  }
  const State state = sample_tile(p, row, tile, line, column, floor);
  if (!in_use || chunk != 0) return;
  p.states[column / kTile * p.slots + slot] = state;
  if (state.score > floor) atomic_max(p.floors + slot, float_order(state.score));
}

}  // namespace
}  // namespace esokern::cuda
