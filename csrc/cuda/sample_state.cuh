// What is known about a row of unmask_sample: what it asks for, and the outcome of some of its columns.
#pragma once

#include <math.h>

#include "common/gumbel.h"
#include "cuda/device.cuh"

namespace esokern::cuda {
namespace {

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

// The outcome of a range of columns.
struct alignas(16) State {
  float score;  // the best
  float logit;
  int32_t column;
  int32_t bad;  // NaN or +inf
  float top;    // the two largest logits of the statistics' distribution
  float second;
  float sum;       // of 2^d, d = (logit - top) * scale * log2(e)
  float weighted;  // of d 2^d
};

__device__ __forceinline__ State empty_state() {
  return {-kInfinity, -kInfinity, -1, 0, -kInfinity, -kInfinity, 0.0f, 0.0f};
}

// (a - b) * scale in units of ln 2 for a <= b, finite for any two floats.
__device__ __forceinline__ float binary_exponent(float a, float b, float scale) {
  return fmaxf((a - b) * fminf(scale * kLog2E, kLargest), -288.0f);
}

// The state of both ranges. Equal scores: the lower column.
__device__ __forceinline__ State merge(const State& a, const State& b, float scale) {
  State out;
  const bool better = b.score > a.score || (b.score == a.score && b.column < a.column);
  out.score = better ? b.score : a.score;
  out.logit = better ? b.logit : a.logit;
  out.column = better ? b.column : a.column;
  out.bad = a.bad | b.bad;
  const bool rises = b.top > a.top;
  const float larger = rises ? b.top : a.top, smaller = rises ? a.top : b.top;
  const float high_sum = rises ? b.sum : a.sum, low_sum = rises ? a.sum : b.sum;
  const float high_weighted = rises ? b.weighted : a.weighted, low_weighted = rises ? a.weighted : b.weighted;
  const float d = binary_exponent(smaller, larger, scale), factor = exp2_fast(d);
  out.top = larger;
  out.second = fmaxf(rises ? b.second : a.second, smaller);
  out.sum = high_sum + factor * low_sum;
  out.weighted = high_weighted + factor * (low_weighted + d * low_sum);
  return out;
}

// Larger float, larger integer; NaN anywhere.
__device__ __forceinline__ int32_t float_order(float x) {
  const int32_t bits = static_cast<int32_t>(Scalar::bits(x));
  return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ __forceinline__ float float_of_order(int32_t order) {
  return Scalar::from_bits(static_cast<uint32_t>(order ^ (order >> 31 & 0x7fffffff)));
}

struct Search;

// One call, or a part of its rows, as the kernels see it. Slots are the rows to draw, in order.
struct SampleProblem {
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
  int64_t slots;    // capacity of the arrays above
  int64_t vocab;    // ids; id i is column shift + i
  int64_t columns;  // whole tiles
  int64_t
      shift;  // vocab_start & 3: ids that share a Philox block and tiles fall on the same ids in every call
  int64_t mask_column;
  uint32_t first_block;  // global id of column 0 over 4
  float softcap;
  bool wants_lse, wants_second;
  bool filtered, filtered_statistics;
};

}  // namespace
}  // namespace esokern::cuda
