// What is known about a row of logits: what it asks of unmask_sample, and the outcome of some of its columns.
#pragma once

#include <math.h>

#include "common/gumbel.h"
#include "cuda/device.cuh"

namespace esokern::cuda {
namespace {

constexpr int kRowThreads = 256;  // of the kernels before and after the tiles
constexpr float kInfinity = __builtin_inff();
constexpr float kLargest = 3.4028234663852886e38f;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// What one row asks for.
struct alignas(16) Row {
  float temperature;  // of the draw; 0 = greedy
  float scale;        // of the statistics: 1, or 1 / temperature
  uint32_t key[2], position, step;
  // The filters kept the logits above threshold and those equal to it in columns <= last_tie.
  float threshold;
  int32_t last_tie;
};

// The log-sum-exp of a range of columns: scale * top + log(sum).
struct alignas(8) LogSum {
  float top = -kInfinity;  // the largest logit
  float sum = 0.0f;        // of 2^d, d = (logit - top) * scale * log2(e); a NaN lasts
};

// The outcome of a range of columns.
struct alignas(16) State {
  float score = -kInfinity;  // the best
  float logit = -kInfinity;
  int32_t column = -1;
  int32_t bad = 0;            // NaN or +inf
  LogSum total;               // of the statistics' distribution
  float second = -kInfinity;  // its second largest logit
  float weighted = 0.0f;      // sum of d 2^d
};

// (a - b) * scale in units of ln 2 for a <= b, finite for any two floats.
__device__ __forceinline__ float binary_exponent(float a, float b, float scale) {
  return fmaxf((a - b) * fminf(scale * kLog2E, kLargest), -288.0f);
}

// The sums of both ranges.
__device__ __forceinline__ LogSum merge(const LogSum& a, const LogSum& b, float scale) {
  const bool rises = b.top > a.top;
  const float larger = rises ? b.top : a.top, smaller = rises ? a.top : b.top;
  const float high_sum = rises ? b.sum : a.sum, low_sum = rises ? a.sum : b.sum;
  return {larger, high_sum + exp2_fast(binary_exponent(smaller, larger, scale)) * low_sum};
}

// The state of both ranges. Equal scores: the lower column.
__device__ __forceinline__ State merge(const State& a, const State& b, float scale) {
  State out;
  const bool better = b.score > a.score || (b.score == a.score && b.column < a.column);
  out.score = better ? b.score : a.score;
  out.logit = better ? b.logit : a.logit;
  out.column = better ? b.column : a.column;
  out.bad = a.bad | b.bad;
  out.total = merge(a.total, b.total, scale);
  const bool rises = b.total.top > a.total.top;
  const float smaller = rises ? a.total.top : b.total.top, low_sum = rises ? a.total.sum : b.total.sum;
  const float high_weighted = rises ? b.weighted : a.weighted, low_weighted = rises ? a.weighted : b.weighted;
  const float d = binary_exponent(smaller, out.total.top, scale);
  out.second = fmaxf(rises ? b.second : a.second, smaller);
  out.weighted = high_weighted + exp2_fast(d) * (low_weighted + d * low_sum);
  return out;
}

// As shfl_xor of their parts.
__device__ __forceinline__ LogSum exchange(const LogSum& state, int lanes) {
  LogSum other;
  other.top = shfl_xor(state.top, lanes);
  other.sum = shfl_xor(state.sum, lanes);
  return other;
}
__device__ __forceinline__ State exchange(const State& state, int lanes) {
  State other;
  other.score = shfl_xor(state.score, lanes);
  other.logit = shfl_xor(state.logit, lanes);
  other.column = shfl_xor(state.column, lanes);
  other.bad = shfl_xor(state.bad, lanes);
  other.total = exchange(state.total, lanes);
  other.second = shfl_xor(state.second, lanes);
  other.weighted = shfl_xor(state.weighted, lanes);
  return other;
}

// By a block: what becomes of `count` states, states[0], states[stride], ..., merged in one order, in thread 0.
// warp_state: one per warp, in shared memory.
template <class S>
__device__ __forceinline__ S merge_states(const S* states, int64_t stride, int64_t count, float scale,
                                          S* warp_state) {
  S state;
  for (int64_t i = threadIdx.x; i < count; i += kRowThreads) state = merge(state, states[i * stride], scale);
#pragma unroll
  for (int lanes = 1; lanes < kWarpSize; lanes *= 2) state = merge(state, exchange(state, lanes), scale);
  if (threadIdx.x % kWarpSize == 0) warp_state[threadIdx.x / kWarpSize] = state;
  block_sync();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kRowThreads / kWarpSize; ++warp) state = merge(state, warp_state[warp], scale);
  return state;
}

// Larger float, larger integer; NaN anywhere.
__device__ __forceinline__ int32_t float_order(float x) {
  const int32_t bits = static_cast<int32_t>(Scalar::bits(x));
  return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ __forceinline__ float float_of_order(int32_t order) {
  return Scalar::from_bits(static_cast<uint32_t>(order ^ (order >> 31 & 0x7fffffff)));
}

__device__ __forceinline__ int count_bits(uint32_t x) {
  x -= x >> 1 & 0x55555555u;
  x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
  return static_cast<int>(((x + (x >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24);
}

struct Search;

// The columns of a call's logits. Id i is column shift + i, shift = vocab_start & 3: ids that share a Philox block, and
// tiles, fall on the same ids in every call.
struct Columns {
  int64_t vocab;    // ids
  int64_t columns;  // whole tiles
  int64_t shift;
  int64_t mask_column;  // never drawn, never a target; -1 = none
  float softcap;        // of a logit; 0 = none
};

// One call, or a part of its rows, as the kernels see it. Slots are the rows to draw, in order.
struct SampleProblem : Columns {
  int32_t* count;      // how many slots there are
  int32_t* row_index;  // [slot]: row of the call
  Row* rows;           // [slot]
  // [slot]: the best score that any block has seen (float_order). It only says what need not be looked at closely, so
  // an old value costs time, never a bit of the result.
  int32_t* floors;
  State* states;  // [tile][slots]
  float* logits;  // [slot][columns]; given = store them here instead of sampling
  // For rows with filters (keep_prefix.cuh).
  int32_t* tops;  // [slot]: the largest logit (float_order), +inf if one is NaN or +inf
  int32_t* bins;
  Search* searches;
  int64_t slots;         // capacity of the arrays above
  uint32_t first_block;  // global id of column 0 over 4
  bool wants_lse, wants_second;
  bool filtered, filtered_statistics;
};

}  // namespace
}  // namespace esokern::cuda
