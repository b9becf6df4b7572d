// Where a block's results go: finished rows, parts of a split, or NaN.
#pragma once

#include "cuda/attention_tile.cuh"

namespace esokern::cuda {
namespace {

// A finished row: to the output, or as part of a split. Lane = of the sequence.
template <class T>
struct RowOut {
  T* out;
  float* part;  // nullptr: this is the output
  float* lse;   // nullptr = not wanted

  __device__ __forceinline__ RowOut(const AttentionProblem& p, const Place& place, int64_t kv_head,
                                    int64_t lane, int split, int splits) {
    const int64_t i = place.seq.first_query + lane / p.group, head = kv_head * p.group + lane % p.group;
    out = row_of<T>(p.out, place.b, i, head);
    part = nullptr;
    lse = p.lse == nullptr ? nullptr : p.lse + place.b * p.lse_batch + head * p.lse_head + i * p.lse_row;
    if (splits > 1) {
      const int64_t row = kv_head * p.part_head + place.b * p.part_sequence +
                          place.seq.first_query * p.group * p.part_lane + lane * splits + split;
      part = p.part_out + row * p.head_dim;
      lse = p.part_lse + row;
    }
  }
  // lse2: to base 2, as parts keep it.
  __device__ __forceinline__ void store_lse(float lse2) const {
    if (lse != nullptr) *lse = part == nullptr ? lse2 * kLn2 : lse2;
  }
  // Columns d and d + 1.
  __device__ __forceinline__ void store_pair(int d, float x, float y, bool aligned) const {
    if (part != nullptr) {
      part[d] = x;
      part[d + 1] = y;
      return;
    }
    cuda::store_pair(out, d, x, y, aligned);
  }
};

// Outputs of a sequence with a value out of range.
template <class T>
__device__ __forceinline__ void store_nan(const AttentionProblem& p, const Place& place, int64_t kv_head) {
  if (blockIdx.y != 0) return;
  const int pairs = p.head_dim / 2;
  for (int item = threadIdx.x; item < place.lanes * pairs; item += kThreads) {
    const RowOut<T> row(p, place, kv_head, place.first_lane + item / pairs, 0, 1);
    row.store_pair(item % pairs * 2, __builtin_nanf(""), __builtin_nanf(""), p.out.aligned);
    if (item % pairs == 0) row.store_lse(__builtin_nanf(""));
  }
}

// Merges what the warps found for their keys, in their order, and stores the rows.
template <class Tile, class T>
__device__ __forceinline__ void merge_and_store(const AttentionProblem& p, const Place& place,
                                                int64_t kv_head, int split, int splits,
                                                const typename Tile::Smem& smem,
                                                const RunningSoftmax& softmax,
                                                const float (&out)[Tile::kColumnTiles][4]) {
  constexpr int kStride = Tile::kMergeStride;
  const int warp = threadIdx.x / kWarpSize, g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h)
    if (t == 0) {
      smem.row_max[warp * Tile::kLanes + g + 8 * h] = softmax.max[h];
      smem.row_sum[warp * Tile::kLanes + g + 8 * h] = softmax.sum[h];
    }
  block_sync();
  // Of lane r: the largest score, the sum of weights, and what warp w's part counts.
  const auto best_of = [&](int r) {
    float best = kNegInf;
    for (int w = 0; w < kWarps; ++w) {
      const float other = smem.row_max[w * Tile::kLanes + r];
      best = other > best ? other : best;
    }
    return best == kNegInf ? 0.0f : best * p.scale;
  };
  const auto weight_of = [&](int r, int w, float shift) {
    return exp2_fast(smem.row_max[w * Tile::kLanes + r] * p.scale - shift);
  };
  float weight[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) weight[h] = weight_of(g + 8 * h, warp, best_of(g + 8 * h));
  for (int turn = 0; turn < kWarps; ++turn) {
    if (turn == warp) {
#pragma unroll
      for (int n = 0; n < Tile::kColumnTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float* sum = smem.merge + (g + i / 2 * 8) * kStride + 8 * n + 2 * t + i % 2;
          const float mine = out[n][i] * weight[i / 2];
          *sum = turn == 0 ? mine : *sum + mine;
        }
    }
    block_sync();
  }
  const int pairs = p.head_dim / 2;
  for (int item = threadIdx.x; item < place.lanes * pairs; item += kThreads) {
    const int r = item / pairs, d = item % pairs * 2;
    const float shift = best_of(r);
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += smem.row_sum[w * Tile::kLanes + r] * weight_of(r, w, shift);
    const float inverse = sum > 0.0f ? 1.0f / sum : sum;  // NaN stays NaN
    const RowOut<T> row(p, place, kv_head, place.first_lane + r, split, splits);
    row.store_pair(d, smem.merge[r * kStride + d] * inverse, smem.merge[r * kStride + d + 1] * inverse,
                   p.out.aligned);
    if (d == 0) row.store_lse(sum == 0.0f ? kNegInf : shift + log2_fast(sum));
  }
  block_sync();
}

// The same where each warp has its own lanes.
template <class Tile, class T>
__device__ __forceinline__ void store_rows(const AttentionProblem& p, const Place& place, int64_t kv_head,
                                           int split, int splits, const RunningSoftmax& softmax,
                                           const float (&out)[Tile::kColumnTiles][4]) {
  const int warp = threadIdx.x / kWarpSize, g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = warp * 16 + g + 8 * h;
    if (r >= place.lanes) continue;
    const float sum = softmax.sum[h];
    const float inverse = sum > 0.0f ? 1.0f / sum : sum;
    const RowOut<T> row(p, place, kv_head, place.first_lane + r, split, splits);
#pragma unroll
    for (int n = 0; n < Tile::kColumnTiles; ++n)
      if (8 * n < p.head_dim)
        row.store_pair(8 * n + 2 * t, out[n][2 * h] * inverse, out[n][2 * h + 1] * inverse, p.out.aligned);
    if (t == 0) row.store_lse(sum == 0.0f ? kNegInf : softmax.max[h] * p.scale + log2_fast(sum));
  }
}

}  // namespace
}  // namespace esokern::cuda
