// Attention of whole sequences under a rank-integer mask:
//   out_i = sum_j softmax_j(softmax_scale q_i . k_j) v_j over visible(i, j)     (common/mask.h)
// Work and memory: attention_kernel.cu. In packed layouts a first kernel finds the sequences; where cu_seqlens does not
// rise from 0 to the number of rows, all outputs are NaN.
// Limits: float32, bfloat16, float16; head_dim a multiple of 8 up to 256.
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

struct Call {
  AttentionProblem problem;
  int64_t sequence_bytes, bytes;
};
Call plan(const AttentionArgs& a, void* workspace) {
  const bool packed = a.cu_seqlens_q.given();
  const int64_t batch = packed ? a.cu_seqlens_q.shape[0] - 1 : a.q.shape[0];
  Call call = {make_problem(a.out, a.lse, a.q, a.k, a.v, packed, batch, a.softmax_scale), 0, 0};
  AttentionProblem& p = call.problem;
  const int64_t keys = a.k.shape[packed ? 0 : 1];
  ESOKERN_CHECK(keys < kMaxKeys, "too many keys", keys);
  p.max_keys = static_cast<int32_t>(keys);
  p.chunk_mask = a.k_rank.given() ? kExplicitRank : kEveryKeyVisible;
  p.k_rank = ints_view(a.k_rank, packed);
  p.prefix_end = ints_view(a.prefix_end, packed);
  p.window_start = ints_view(a.window_start, packed);
  p.window_end = ints_view(a.window_end, packed);
  if (packed) {
    p.sequences = static_cast<Sequence*>(workspace);
    call.sequence_bytes = batch * static_cast<int64_t>(sizeof(Sequence));
  }
  call.bytes =
      call.sequence_bytes +
      plan_attention(&p, a.q.dtype,
                     workspace == nullptr ? nullptr : static_cast<char*>(workspace) + call.sequence_bytes);
  return call;
}

}  // namespace

int64_t attention_workspace(const AttentionArgs& args) {
  return plan(args, nullptr).bytes;
}

void attention(const AttentionArgs& args, void* workspace, void* stream) {
  const AttentionProblem problem = plan(args, workspace).problem;
  if (problem.packed && problem.batch > 0)
    launch("attention_sequences", packed_sequences_kernel, Grid{}, kPlanThreads, 128, stream,
           problem.sequences, ints_view(args.cu_seqlens_q, true), ints_view(args.cu_seqlens_k, true),
           problem.batch, args.q.shape[0], args.k.shape[0]);
  run_attention(problem, args.q.dtype, stream);
}

}  // namespace esokern::cuda
