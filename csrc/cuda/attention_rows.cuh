// Device-side reading of an AttentionProblem: sequences, lanes, rotated rows.
#pragma once

#include "cuda/attention_problem.h"

namespace esokern::cuda {
namespace {

__device__ __forceinline__ Sequence sequence(const AttentionProblem& p, int64_t b) {
  if (p.sequences != nullptr) return p.sequences[b];
  return {0, p.seqlen_q, 0, p.max_keys, 0, p.seqlen_q, static_cast<int32_t>(b), 0};
}

// The last sequence b of a packed layout for which start(b) <= at; start rises.
template <class Start>
__device__ __forceinline__ int64_t find_sequence(int64_t batch, int64_t at, const Start& start) {
  int64_t low = 0, high = batch;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (start(middle) <= at)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// What query row i of the sequence sees.
__device__ __forceinline__ QueryRange query_range(const AttentionProblem& p, int64_t b, const Sequence& seq,
                                                  int64_t i) {
  if (p.chunk_mask == kEveryKeyVisible) return {INT32_MAX, 0, -1};
  if (p.chunk_mask == kExplicitRank) {
    const int64_t row = seq.first_query + i;
    if (p.window_start.data == nullptr) return {p.prefix_end.at(b, row), 0, -1};
    return {p.prefix_end.at(b, row), p.window_start.at(b, row), p.window_end.at(b, row)};
  }
  if (!p.append) return {seq.cached - 1, 0, -1};
  return chunk_query_range(p.chunk_mask, seq.cached, seq.rows, seq.clean, static_cast<int32_t>(i));
}

template <class T>
__device__ __forceinline__ T* row_of(const RowsView& t, int64_t b, int64_t row, int64_t head) {
  return static_cast<T*>(t.data) + b * t.batch + row * t.row + head * t.head;
}

__device__ __forceinline__ float table_entry(const void* table, DType dtype, int64_t at) {
  if (dtype == DType::f32) return static_cast<const float*>(table)[at];
  if (dtype == DType::bf16) return to_float(static_cast<const bf16*>(table)[at]);
  return to_float(static_cast<const f16*>(table)[at]);
}

// Element d of a row, rotated at `position`. Products are rounded before they are added, as the reference does.
template <class T>
__device__ __forceinline__ float rotated(const Rotary& rotary, const T* row, int d, int64_t position) {
  const float x = to_float(row[d]);
  if (d >= 2 * rotary.half) return x;
  const bool second = rotary.interleaved ? d % 2 != 0 : d >= rotary.half;
  const int partner = rotary.interleaved ? d ^ 1 : second ? d - rotary.half : d + rotary.half;
  const int column = rotary.interleaved ? d / 2 : second ? partner : d;
  const float y = to_float(row[partner]);
  const float cos =
      table_entry(rotary.cos, rotary.dtype, position * rotary.cos_row + column * rotary.cos_column);
  const float sin =
      table_entry(rotary.sin, rotary.dtype, position * rotary.sin_row + column * rotary.sin_column);
  return second ? mul_rounded(x, cos) + mul_rounded(y, sin) : mul_rounded(x, cos) - mul_rounded(y, sin);
}

// Where cu_seqlens cannot be followed, the first sequence has all rows of the call, and they are NaN.
__device__ __forceinline__ Sequence all_bad_sequence(int64_t b, int64_t total_rows) {
  const int32_t rows = static_cast<int32_t>(total_rows);
  return {b == 0 ? 0 : rows, b == 0 ? rows : 0, 0, -1, 0, 0, 0, 0};
}

// Is `value` true for any thread of the block? `shared` holds an int per warp.
__device__ __forceinline__ bool block_any(bool value, int32_t* shared) {
  const uint32_t votes = ballot(value);
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = votes != 0;
  block_sync();
  bool any = false;
  for (unsigned warp = 0; warp < blockDim.x / kWarpSize; ++warp) any |= shared[warp] != 0;
  block_sync();
  return any;
}
// Some of the values that this thread looks at do not rise from 0 to `total`.
__device__ __forceinline__ bool bad_ends(IntsView ends, int64_t batch, int64_t total) {
  bool bad = false;
  for (int64_t b = threadIdx.x; b <= batch; b += blockDim.x) {
    const int32_t here = ends.at(0, b);
    bad |= b == 0 ? here != 0 : here < ends.at(0, b - 1);
    bad |= b == batch && here != total;
  }
  return bad;
}

}  // namespace
}  // namespace esokern::cuda
