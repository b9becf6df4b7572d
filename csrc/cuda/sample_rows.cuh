// The first and the last kernel of unmask_sample: which rows are drawn, and what becomes of them.
#pragma once

#include "cuda/keep_prefix.cuh"

namespace esokern::cuda {
namespace {

constexpr int kRowThreads = 256;

// What a kernel reads and writes of rows first_row, first_row + 1, ..., and its outputs, any of which but tokens and
// invalid may be null.
struct Rows {
  int64_t first_row, count;
  PerRow<float> temperature;
  PerRow<int64_t> seed, positions, step;
  int64_t* tokens;
  uint8_t* invalid;
  float *logprob, *prob, *margin, *entropy, *lse, *score;
  int64_t ld_tokens, ld_invalid, ld_logprob, ld_prob, ld_margin, ld_entropy, ld_lse, ld_score;
  int64_t mask_id, vocab_start;
  bool sampling_statistics;
};

__device__ __forceinline__ void put(float* to, int64_t stride, int64_t row, float value) {
  if (to != nullptr) to[row * stride] = value;
}

__device__ __forceinline__ void write_carried(const Rows& rows,
                                              int64_t row) {  // a token that is there is certain
  put(rows.logprob, rows.ld_logprob, row, 0.0f);
  put(rows.prob, rows.ld_prob, row, 1.0f);
  put(rows.margin, rows.ld_margin, row, 1.0f);
  put(rows.entropy, rows.ld_entropy, row, 0.0f);
  put(rows.lse, rows.ld_lse, row, 0.0f);
  put(rows.score, rows.ld_score, row, kInfinity);
  rows.invalid[row * rows.ld_invalid] = 0;
}

__device__ __forceinline__ void write_row(const Rows& rows, const SampleProblem& p, int64_t row, float scale,
                                          const State& state) {
  const bool invalid = state.bad != 0 || !(state.score > -kInfinity);
  rows.invalid[row * rows.ld_invalid] = invalid ? 1 : 0;
  if (invalid) {
    const float nan = __builtin_nanf(""), nothing = state.bad != 0 ? nan : -kInfinity;
    put(rows.logprob, rows.ld_logprob, row, nan);
    put(rows.prob, rows.ld_prob, row, nan);
    put(rows.margin, rows.ld_margin, row, nan);
    put(rows.entropy, rows.ld_entropy, row, nan);
    put(rows.lse, rows.ld_lse, row, nothing);
    put(rows.score, rows.ld_score, row, nothing);
    return;
  }
  rows.tokens[row * rows.ld_tokens] = rows.vocab_start + state.column - p.shift;
  put(rows.score, rows.ld_score, row, state.score);
  const float log_sum = logf(state.sum);  // of a sum that is at least 1
  const float logprob = (state.logit - state.top) * scale - log_sum;
  put(rows.logprob, rows.ld_logprob, row, logprob);
  put(rows.prob, rows.ld_prob, row, expf(logprob));
  put(rows.margin, rows.ld_margin, row, (1.0f - expf((state.second - state.top) * scale)) / state.sum);
  put(rows.entropy, rows.ld_entropy, row, log_sum - state.weighted * kLn2 / state.sum);
  put(rows.lse, rows.ld_lse, row, state.top * scale + log_sum);
}

// One block: the rows to draw become slots, in order; the others are finished.
__global__ void __launch_bounds__(kRowThreads) list_rows(SampleProblem p, Rows rows) {
  Arena arena;
  int32_t* warp_count = arena.take<int32_t>(kRowThreads / kWarpSize);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int32_t slots = 0;
  for (int64_t begin = 0; begin < rows.count; begin += kRowThreads) {
    const int64_t row = rows.first_row + begin + threadIdx.x;
    const bool exists = begin + threadIdx.x < rows.count;
    const bool drawn = exists && (rows.mask_id < 0 || rows.tokens[row * rows.ld_tokens] == rows.mask_id);
    const uint32_t lanes = ballot(drawn);
    if (lane == 0) warp_count[warp] = count_bits(lanes);
    block_sync();
    int32_t slot = slots + count_bits(lanes & ((1u << lane) - 1u));
    for (int w = 0; w < kRowThreads / kWarpSize; ++w) {
      if (w < warp) slot += warp_count[w];
      slots += warp_count[w];
    }
    block_sync();
    if (drawn) {
      const float temperature = rows.temperature[row];
      const float inverse = rows.sampling_statistics && temperature > 0.0f ? 1.0f / temperature : 1.0f;
      const uint64_t seed = static_cast<uint64_t>(rows.seed[row]);
      p.row_index[slot] = static_cast<int32_t>(row);
      p.floors[slot] = float_order(-kInfinity);
      if (p.filtered) p.tops[slot] = float_order(-kInfinity);
      p.rows[slot] = {temperature,
                      fminf(inverse, kLargest),
                      {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
                      static_cast<uint32_t>(rows.positions[row]),
                      static_cast<uint32_t>(rows.step[row]),
                      -kInfinity,
                      INT32_MAX};
    } else if (exists) {
      write_carried(rows, row);
    }
  }
  if (threadIdx.x == 0) *p.count = slots;
  if (!p.filtered) return;
  for (int32_t slot = 0; slot < slots; ++slot)
    for (int i = threadIdx.x; i < 2 * kBins; i += kRowThreads) row_bins(p, slot, 0)[i] = 0;
}

// A block per slot: its states in a fixed order, then its results.
__global__ void __launch_bounds__(kRowThreads) finish_rows(SampleProblem p, Rows rows) {
  Arena arena;
  State* warp_state = arena.take<State>(kRowThreads / kWarpSize);
  const int64_t slot = blockIdx.x;
  if (slot >= *p.count) return;
  const float scale = p.rows[slot].scale;
  State state = empty_state();
  for (int64_t tile = threadIdx.x; tile < p.columns / kTile; tile += kRowThreads)
    state = merge(state, p.states[tile * p.slots + slot], scale);
#pragma unroll
  for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
    State other;
    other.score = shfl_xor(state.score, lanes);
    other.logit = shfl_xor(state.logit, lanes);
    other.column = shfl_xor(state.column, lanes);
    other.bad = shfl_xor(state.bad, lanes);
    other.top = shfl_xor(state.top, lanes);
    other.second = shfl_xor(state.second, lanes);
    other.sum = shfl_xor(state.sum, lanes);
    other.weighted = shfl_xor(state.weighted, lanes);
    state = merge(state, other, scale);
  }
  if (threadIdx.x % kWarpSize == 0) warp_state[threadIdx.x / kWarpSize] = state;
  block_sync();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kRowThreads / kWarpSize; ++warp) state = merge(state, warp_state[warp], scale);
  write_row(rows, p, p.row_index[slot], scale, state);
}

}  // namespace
}  // namespace esokern::cuda
