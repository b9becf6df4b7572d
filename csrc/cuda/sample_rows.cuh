// The first and the last kernel of unmask_sample: which rows are drawn, and what becomes of them.
#pragma once

#include "cuda/keep_prefix.cuh"
#include "cuda/list_slots.cuh"

namespace esokern::cuda {
namespace {

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
  const float log_sum = logf(state.total.sum);  // of a sum that is at least 1
  const float logprob = (state.logit - state.total.top) * scale - log_sum;
  put(rows.logprob, rows.ld_logprob, row, logprob);
  put(rows.prob, rows.ld_prob, row, expf(logprob));
  put(rows.margin, rows.ld_margin, row,
      (1.0f - expf((state.second - state.total.top) * scale)) / state.total.sum);
  put(rows.entropy, rows.ld_entropy, row, log_sum - state.weighted * kLn2 / state.total.sum);
  put(rows.lse, rows.ld_lse, row, state.total.top * scale + log_sum);
}

// One block: the rows to draw become slots, in order; the others are finished.
__global__ void __launch_bounds__(kRowThreads) list_rows(SampleProblem p, Rows rows) {
  Arena arena;
  int32_t* warp_counts = arena.take<int32_t>(kListCounts);
  const int32_t slots = list_slots(
      rows.count, warp_counts,
      [&](int64_t i) {
        const int64_t row = rows.first_row + i;
        return rows.mask_id < 0 || rows.tokens[row * rows.ld_tokens] == rows.mask_id;
      },
      [&](int64_t i, bool drawn, int32_t slot) {
        const int64_t row = rows.first_row + i;
        if (!drawn) return write_carried(rows, row);
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
      });
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
  const State state = merge_states(p.states + slot, p.slots, p.columns / kTile, scale, warp_state);
  if (threadIdx.x == 0) write_row(rows, p, p.row_index[slot], scale, state);
}

}  // namespace
}  // namespace esokern::cuda
