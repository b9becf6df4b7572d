// Attention of whole sequences under a rank-integer mask:
//   out_i = sum_j softmax_j(softmax_scale q_i . k_j) v_j over visible(i, j)     (common/mask.h)
// Work and memory: attention_kernel.cu. In packed layouts a first kernel finds the sequences; where cu_seqlens does not
// rise from 0 to the number of rows, all outputs are NaN.
// Limits: float32, bfloat16, float16; head_dim a multiple of 8 up to 256.
#include "cuda/attention_sequences.cuh"

namespace esokern::cuda {

int64_t attention_workspace(const AttentionArgs& args) {
  Scratch scratch(nullptr);
  AttentionProblem problem = plan_sequences(args, &scratch);
  plan_attention(&problem, args.q.dtype, &scratch);
  return scratch.bytes();
}

void attention(const AttentionArgs& args, void* workspace, void* stream) {
  Scratch scratch(workspace);
  AttentionProblem problem = plan_sequences(args, &scratch);
  plan_attention(&problem, args.q.dtype, &scratch);
  find_sequences(problem, args, stream);
  run_attention(problem, args.q.dtype, stream);
}

}  // namespace esokern::cuda
