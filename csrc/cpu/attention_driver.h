// Splits a call of either attention op into tasks and runs them: (sequence, kv head, block of query lanes,
// split of keys). Blocks and splits depend on the sequence's own lengths alone; splits merge in a fixed
// order.
#pragma once

#include <cstddef>

#include "cpu/attention_few_rows.h"
#include "cpu/attention_many_rows.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace esokern::cpu::ESOKERN_ISA {
namespace {

constexpr int kSplitKeys = 2048;  // keys per split of a block that is alone with its sequence

template <class T>
void attend_block(Block& block, const Keys<T>& keys, int64_t begin, int64_t end) {
  block.start();
  if (block.lanes <= kFewLanes)
    attend_few(block, keys, begin, end);
  else
    attend_many(block, keys, begin, end);
}

// out = merge of `splits` partial rows (each [head_dim] + lse) laid out `stride` floats apart; fixed order.
ESOKERN_INLINE float merge_splits(const float* parts, int64_t stride, int splits, int head_dim, float* row) {
  float best = kNegInf;
  for (int s = 0; s < splits; ++s) {
    const float lse = parts[s * stride + head_dim];
    best = lse > best ? lse : best;
  }
  for (int d = 0; d < head_dim; ++d) row[d] = 0.0f;
  if (best == kNegInf) return kNegInf;
  float sum = 0.0f;
  for (int s = 0; s < splits; ++s) {
    const float weight = __builtin_expf(parts[s * stride + head_dim] - best);
    sum += weight;
    for (int d = 0; d < head_dim; ++d) row[d] += weight * parts[s * stride + d];
  }
  for (int d = 0; d < head_dim; ++d) row[d] /= sum;
  return best + __builtin_logf(sum);
}

// What an op tells about itself:
//   int64_t batch, heads, kv_heads; int head_dim;
//   int64_t rows(b)                           query rows of sequence b
//   Keys<T> keys(b, kv_head)
//   QueryRange range(b, i)
//   void query(b, i, head, float* row)        the query, rotated; scale() = log2(e) * softmax_scale
//   void store(b, i, head, const float* row, float lse)
template <class T, class Op>
void run_attention(const Op& op) {
  const int64_t group = op.heads / op.kv_heads;
  struct Plan {
    int64_t first_task, blocks, splits, first_part;
  };
  const Scratch<Plan> plan_memory(op.batch + 1);
  Plan* plan = plan_memory.data;
  const int64_t part_stride = op.head_dim + 1;
  int64_t tasks = 0, parts = 0;
  for (int64_t b = 0; b < op.batch; ++b) {
    const int64_t lanes = op.rows(b) * group;
    const int64_t blocks = (lanes + kBlockLanes - 1) / kBlockLanes;
    const int64_t count = op.keys(b, 0).count;
    const int64_t splits = blocks == 1 && count > kSplitKeys ? (count + kSplitKeys - 1) / kSplitKeys : 1;
    plan[b] = {tasks, blocks, splits, parts};
    tasks += op.kv_heads * blocks * splits;
    if (splits > 1) parts += op.kv_heads * lanes * splits * part_stride;
  }
  plan[op.batch].first_task = tasks;
  const Scratch<float> partial(parts);

  const auto find = [&](int64_t task) {
    int64_t low = 0, high = op.batch;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (plan[middle].first_task <= task ? low : high) = middle;
    }
    return low;
  };
  parallel_for(tasks, [&](int64_t task) {
    const int64_t b = find(task);
    const Plan& p = plan[b];
    const int64_t at = task - p.first_task;
    const int64_t split = at % p.splits, block_index = at / p.splits % p.blocks,
                  kv_head = at / p.splits / p.blocks;
    const int64_t all_lanes = op.rows(b) * group, first_lane = block_index * kBlockLanes;
    const Keys<T> keys = op.keys(b, kv_head);
    Block block;
    block.head_dim = op.head_dim;
    block.lanes =
        static_cast<int>(all_lanes - first_lane < kBlockLanes ? all_lanes - first_lane : kBlockLanes);
    block.scale = op.scale();
    block.pairs = kBf16Pairs && kIsBf16<T> && block.lanes > kFewLanes;
    block.any_rest = false;
    alignas(64) float row[kMaxHeadDim];
    for (int r = 0; r < block.lanes; ++r) {
      const int64_t i = (first_lane + r) / group, head = kv_head * group + (first_lane + r) % group;
      op.query(b, i, head, row);
      block.set_query(r, row, op.range(b, i));
    }
    const int64_t begin = split * kSplitKeys;
    const int64_t end = p.splits == 1 || begin + kSplitKeys > keys.count ? keys.count : begin + kSplitKeys;
    attend_block(block, keys, begin, end);
    for (int r = 0; r < block.lanes; ++r) {
      const float lse = finish_row(block, r, row);
      if (p.splits == 1) {
        const int64_t i = (first_lane + r) / group, head = kv_head * group + (first_lane + r) % group;
        op.store(b, i, head, row, lse);
      } else {
        float* part =
            partial.data + p.first_part + ((kv_head * all_lanes + r) * p.splits + split) * part_stride;
        for (int d = 0; d < op.head_dim; ++d) part[d] = row[d];
        part[op.head_dim] = lse;
      }
    }
  });
  if (parts == 0) return;
  parallel_for(op.batch, [&](int64_t b) {
    const Plan& p = plan[b];
    if (p.splits == 1) return;
    const int64_t lanes = op.rows(b) * group;
    alignas(64) float row[kMaxHeadDim];
    for (int64_t kv_head = 0; kv_head < op.kv_heads; ++kv_head)
      for (int64_t r = 0; r < lanes; ++r) {
        const float* first = partial.data + p.first_part + (kv_head * lanes + r) * p.splits * part_stride;
        const float lse = merge_splits(first, part_stride, static_cast<int>(p.splits), op.head_dim, row);
        op.store(b, r / group, kv_head * group + r % group, row, lse);
      }
  });
}

// cu_seqlens of a packed layout: 0, rising, ending at total.
ESOKERN_INLINE void check_cu_seqlens(const int32_t* cu_seqlens, int64_t batch, int64_t stride,
                                     int64_t total) {
  ESOKERN_CHECK(cu_seqlens[0] == 0, "cu_seqlens must begin with 0", cu_seqlens[0]);
  for (int64_t b = 0; b < batch; ++b)
    ESOKERN_CHECK(cu_seqlens[b * stride] <= cu_seqlens[(b + 1) * stride],
                  "cu_seqlens must not fall, at entry", b + 1);
  ESOKERN_CHECK(cu_seqlens[batch * stride] == total, "cu_seqlens must end at the number of rows",
                cu_seqlens[batch * stride]);
}

// Tensor::ptr throws on a wrong dtype, which must happen before threads start: exceptions cannot leave them.
template <class T, size_t kCount>
void check_dtypes(const Tensor (&tensors)[kCount]) {
  for (const Tensor& tensor : tensors) tensor.ptr<T>();
}

ESOKERN_INLINE void check_layout(const Tensor& t) {
  const int64_t head_dim = t.shape[t.ndim - 1];
  ESOKERN_CHECK(head_dim % 8 == 0 && head_dim > 0 && head_dim <= kMaxHeadDim,
                "head_dim: supported are multiples of 8 up to 256", head_dim);
  ESOKERN_CHECK(head_dim <= 1 || t.stride[t.ndim - 1] == 1,
                "the last dimension (head_dim) must be contiguous, stride", t.stride[t.ndim - 1]);
}

}  // namespace
}  // namespace esokern::cpu::ESOKERN_ISA
