// What `attention` and its gradients begin with: the sequences of a packed layout and the ranks of a mask. Where cu_seqlens
// does not rise from 0 to the number of rows, every sequence is bad and all outputs are NaN.
#pragma once

#include "cuda/attention_rows.cuh"
#include "ops.h"

namespace esokern::cuda {
namespace {

constexpr int kPlanThreads = 128;

__global__ void __launch_bounds__(kPlanThreads)
    packed_sequences_kernel(Sequence* sequences, IntsView ends_q, IntsView ends_k, int64_t batch,
                            int64_t total_q, int64_t total_k) {
  Arena arena;
  int32_t* votes = arena.take<int32_t>(kPlanThreads / kWarpSize);
  const bool bad = block_any(bad_ends(ends_q, batch, total_q) || bad_ends(ends_k, batch, total_k), votes);
  for (int64_t b = threadIdx.x; b < batch; b += blockDim.x)
    sequences[b] = bad ? all_bad_sequence(b, total_q)
                       : Sequence{ends_q.at(0, b),
                                  ends_q.at(0, b + 1) - ends_q.at(0, b),
                                  ends_k.at(0, b),
                                  ends_k.at(0, b + 1) - ends_k.at(0, b),
                                  0,
                                  0,
                                  0,
                                  0};
}

// Of AttentionArgs or AttentionBackwardArgs, which name these tensors alike.
template <class Args>
AttentionProblem plan_sequences(const Args& a, Scratch* scratch) {
  const bool packed = a.cu_seqlens_q.given();
  const int64_t batch = packed ? a.cu_seqlens_q.shape[0] - 1 : a.q.shape[0];
  AttentionProblem p = make_problem(a.out, a.lse, a.q, a.k, a.v, packed, batch, a.softmax_scale);
  const int64_t keys = a.k.shape[packed ? 0 : 1];
  ESOKERN_CHECK(keys < kMaxKeys, "too many keys", keys);
  p.max_keys = static_cast<int32_t>(keys);
  p.chunk_mask = a.k_rank.given() ? kExplicitRank : kEveryKeyVisible;
  p.k_rank = ints_view(a.k_rank, packed);
  p.prefix_end = ints_view(a.prefix_end, packed);
  p.window_start = ints_view(a.window_start, packed);
  p.window_end = ints_view(a.window_end, packed);
  if (packed) p.sequences = scratch->take<Sequence>(batch);
  return p;
}

// Fills in `sequences`, if they are packed.
template <class Args>
void find_sequences(const AttentionProblem& p, const Args& a, void* stream) {
  if (p.packed && p.batch > 0)
    launch("attention_sequences", packed_sequences_kernel, Grid{}, kPlanThreads, 128, stream, p.sequences,
           ints_view(a.cu_seqlens_q, true), ints_view(a.cu_seqlens_k, true), p.batch, a.q.shape[0],
           a.k.shape[0]);
}

}  // namespace
}  // namespace esokern::cuda
