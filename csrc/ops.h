// THE contract: one Args struct per op, shared by every back end. Kernels know memory and numbers, not Python,
// not torch; they allocate no outputs and keep no state. Optional tensors are "not given" (Tensor::given()).
// Meaning is checked by the op cards in esokern/*.py; kernels check what they can serve (ESOKERN_CHECK).
#pragma once

#include <cstdint>

#include "tensor.h"

namespace esokern {

// visible(i, j) = k_rank[j] <= prefix_end[i] or window_start[i] <= k_rank[j] <= window_end[i]   (common/mask.h)
struct AttentionArgs {
  Tensor out;   // [batch, seqlen_q, heads, head_dim] or [total_q, heads, head_dim], dtype of q
  Tensor lse;   // f32 [batch, heads, seqlen_q] or [heads, total_q], natural log; optional
  Tensor q;     // [batch, seqlen_q, heads, head_dim] or [total_q, heads, head_dim]; last dim contiguous
  Tensor k, v;  // [batch, seqlen_kv, kv_heads, head_dim] or [total_k, kv_heads, head_dim]
  Tensor cu_seqlens_q;  // i32 [batch + 1]; both cu_seqlens given = packed layout
  Tensor cu_seqlens_k;  // i32 [batch + 1]
  Tensor
      k_rank;  // i32 [batch, seqlen_kv] (batch stride may be 0) or [total_k]; not given = every key visible
  Tensor prefix_end;    // i32 [batch, seqlen_q] or [total_q]; given with k_rank
  Tensor window_start;  // i32 like prefix_end; optional, given together with window_end
  Tensor window_end;
  float softmax_scale = 1.0f;
};

// Gradients of `attention`, from what its forward returned. With p_ij = exp(softmax_scale q_i . k_j - lse_i) and
// delta_i = dout_i . out_i - dlse_i:
//   dv_j = sum_i p_ij dout_i,  ds_ij = p_ij (dout_i . v_j - delta_i),
//   dq_i = softmax_scale sum_j ds_ij k_j,  dk_j = softmax_scale sum_i ds_ij q_i      over visible(i, j)
struct AttentionBackwardArgs {
  Tensor dq, dk, dv;  // like q, k, v; every element is written
  Tensor q, k, v;     // and the rest as in AttentionArgs
  Tensor out, lse;
  Tensor dout;  // like out
  Tensor dlse;  // f32 like lse; optional
  Tensor cu_seqlens_q, cu_seqlens_k;
  Tensor k_rank, prefix_end, window_start, window_end;
  float softmax_scale = 1.0f;
  bool deterministic = false;  // the same bits every time, where that costs something (CUDA)
};

// How the rows of one call see each other when no explicit ranks are given. Rows are appended in denoising order.
enum class ChunkMask : int32_t {
  causal = 0,         // row i sees every cached row and rows <= i of this call (Eso-LM sampling, AR)
  independent = 1,    // clean rows as causal; a mask row sees the cache, the clean rows and itself
  bidirectional = 2,  // every row sees the cache and all rows of this call (BD3-LM blocks, text-order caches)
  explicit_rank =
      3,  // prefix_end / window_* decide, against k_rank (or the slot number if k_rank is not given)
};

struct AttentionWithKvcacheArgs {
  Tensor out;  // [batch, seqlen_q, heads, head_dim] or packed [total_q, heads, head_dim]
  Tensor lse;  // f32 [batch, heads, seqlen_q] or [heads, total_q]; optional
  Tensor q;    // like out; last dim contiguous
  Tensor k_cache,
      v_cache;  // [rows, max_seqlen, kv_heads, head_dim] or, paged, [pages, page_size, kv_heads, head_dim]; written
  Tensor k, v;           // [batch, seqlen_q, kv_heads, head_dim] or packed; not given = nothing to append
  Tensor cache_seqlens;  // i32 [batch]: rows committed before this call; advanced by num_clean if commit
  Tensor positions;      // i32 [batch, seqlen_q] or [total_q]: place in the text, for rotary
  Tensor rotary_cos;     // f32/bf16/f16 [max_position, rotary_dim / 2]; both or neither
  Tensor rotary_sin;
  Tensor num_clean;  // i32 [batch]: how many leading rows of the call are clean; not given = all
  Tensor
      slots;  // i32 [batch, seqlen_q] or [total_q]: cache row to write, -1 = none; not given = cache_seqlens + i
  Tensor page_table;       // i32 [batch, max_pages]; given = paged cache
  Tensor cache_batch_idx;  // i32 [batch]: which row of a contiguous cache; not given = the batch row
  Tensor cu_seqlens_q;     // i32 [batch + 1]; given = packed layout
  Tensor seqused_q;   // i32 [batch]: rows in use of a padded layout; the rest is neither read nor written
  Tensor k_rank;      // i32 [batch, max_seqlen]; explicit_rank only
  Tensor prefix_end;  // i32 like positions; explicit_rank only
  Tensor window_start;
  Tensor window_end;
  int64_t chunk_mask = 0;
  bool rotary_interleaved = false;
  bool commit = false;
  float softmax_scale = 1.0f;
};

// The order of filters only matters for top_k with top_p: top_k_first renormalises before top_p.
enum class FilterOrder : int32_t { top_k_first = 0, joint = 1 };
// Which distribution logprob, prob, margin, entropy and lse describe.
enum class Statistics : int32_t { model = 0, sampling = 1 };

struct UnmaskSampleArgs {
  Tensor tokens;   // i64 [rows], in/out: only entries equal to mask_id change (all of them if mask_id < 0)
  Tensor logprob;  // f32 [rows]; optional, like the next five
  Tensor prob;
  Tensor margin;       // p(best) - p(second)
  Tensor entropy;      // nats
  Tensor lse;          // natural log
  Tensor score;        // logit + temperature * gumbel of the chosen id, for merging vocabulary shards
  Tensor invalid;      // u8 [rows]: 1 = the row had a NaN, a +inf or nothing finite; its token did not change
  Tensor hidden;       // [rows, hidden_size], or not given
  Tensor weight;       // [vocab, hidden_size]
  Tensor bias;         // [vocab]; optional
  Tensor logits;       // [rows, vocab]; given instead of hidden and weight
  Tensor temperature;  // f32 [rows]; 0 = greedy
  Tensor top_k;        // i32 [rows]; <= 0 = off; optional
  Tensor top_p;        // f32 [rows]; 1 = off; optional
  Tensor min_p;        // f32 [rows]; 0 = off; optional
  Tensor seed;         // i64 [rows]
  Tensor positions;    // i64 [rows]
  Tensor step;         // i64 [rows]
  int64_t mask_id = -1;        // global id, never drawn; -1 = none
  int64_t vocab_start = 0;     // global id of the first row of weight
  float logit_softcap = 0.0f;  // 0 = off
  int64_t filter_order = 0;
  int64_t statistics = 0;
};

// Which of the drawn tokens a denoising step keeps. Column c < window_length[b] of row b stands for position
// window_start[b] + c of its text. A row that is done, and everything outside of the windows, is left alone.
//   edited:     editable, not mask_id, proposed != token and != mask_id, confidence >= edit_threshold
//   taken back: editable, not mask_id, not edited, confidence < remask_threshold: mask_id again, unless chosen below
//   candidates: masks and what is taken back, where proposed != mask_id; NaN confidence counts as -inf
//   key:        confidence, or with temperature T > 0: confidence / T + noise, and the noise alone for T = inf;
//               noise = gumbel of words 0 and 1 of philox(0, position, step, stream 2), keyed by seed
//   chosen:     the first n candidates by falling key (equal keys: lower positions first), n the largest of
//     num_select; 1 + how many are taken back, if any are; how many have key >= threshold;
//     factor:        the candidates before the first i >= 1 with confidence_i < 1 - factor / (i + 2); all if only the
//                    last would be missing
//     entropy_bound: the candidates before the first i with sum_{j <= i} entropy_j - max_{j <= i} entropy_j > bound
//                    (the sum in float64, in the order of the keys; a NaN stops it)
// An option that is not given, or NaN in a row's place, chooses nothing.
struct UnmaskSelectArgs {
  Tensor tokens;          // i64 [batch, length], contiguous; chosen and edited positions get their proposal
  Tensor transfer_index;  // u8 [batch, width]: 1 = chosen or edited; optional, every element written
  Tensor
      num_masked;  // i32 [batch]: masks left in the window; -1 for a window outside of the text (CUDA only)
  Tensor num_transferred;   // i32 [batch]: chosen and edited
  Tensor done;              // u8 [batch]: set where no mask is left and nothing was edited; optional
  Tensor proposed;          // i64 [batch, width]
  Tensor confidence;        // f32 [batch, width]
  Tensor entropy;           // f32 [batch, width], >= 0; with entropy_bound
  Tensor window_start;      // i64 [batch]
  Tensor window_length;     // i64 [batch], <= width; optional: width
  Tensor num_select;        // i32 [batch]; optional, like all that follow
  Tensor threshold;         // f32 [batch]
  Tensor factor;            // f32 [batch]
  Tensor entropy_bound;     // f32 [batch]
  Tensor temperature;       // f32 [batch], of the choice, with seed and step
  Tensor seed;              // i64 [batch]
  Tensor step;              // i64 [batch]
  Tensor editable;          // u8 [batch, length]; not given = every position
  Tensor edit_threshold;    // f32 [batch]
  Tensor remask_threshold;  // f32 [batch]
  int64_t mask_id = 0;
};

enum class Activation : int32_t { none = 0, gelu_tanh = 1 };

// out = residual + activation(normalize(x) weight^T + bias), normalize(x) = (x - mean) / sqrt(var + eps)
struct FusedLinearArgs {
  Tensor out;                   // [rows, out_features]
  Tensor x;                     // [rows, in_features]; last dim contiguous
  Tensor weight;                // [out_features, in_features]
  Tensor bias;                  // [out_features]; optional
  Tensor residual;              // [rows, out_features]; optional, may be out
  float normalize_eps = -1.0f;  // < 0 = no normalisation
  int64_t activation = 0;
};

// sum = residual + x, in float32 and rounded to the dtype; out = (sum - mean) / sqrt(var + eps) * weight + bias over the
// last dimension, of the rounded sum. A token that is no row of the table: ValueError before anything is written, on the
// GPU that row becomes NaN.
struct AddNormArgs {
  Tensor out;  // [rows, hidden]; may be x or residual itself
  Tensor sum;  // [rows, hidden]; optional, may be x or residual itself
  Tensor x;    // [rows, hidden]; with tokens a table [vocab, hidden], of which row tokens[r] stands for row r
  Tensor tokens;    // i64 [rows]; optional
  Tensor residual;  // [rows, hidden]; optional
  Tensor weight;    // [hidden]; optional
  Tensor bias;      // [hidden]; optional
  float eps = 1e-5f;
};

// The log-likelihood of given tokens under an LM head: logit = softcap(hidden weight^T + bias), without the column mask_id;
// softcap(x) = logit_softcap tanh(x / logit_softcap). Rows with a target < 0 are skipped: never read, and written as 0.
struct MaskedCrossEntropyArgs {
  Tensor lse;                  // f32 [rows], natural log: the bits that unmask_sample returns
  Tensor target_logit;         // f32 [rows]; -inf for a target that is mask_id
  Tensor hidden;               // [rows, hidden_size]; last dim contiguous
  Tensor weight;               // [vocab, hidden_size]
  Tensor bias;                 // [vocab]; optional
  Tensor targets;              // i64 [rows]; an id >= vocab: ValueError, on the GPU NaN
  int64_t mask_id = -1;        // never predicted; -1 = none
  float logit_softcap = 0.0f;  // 0 = off
};

// dlogits[r][v] = grad[r] (exp(logit[r][v] - lse[r]) - [v is the target of r]) softcap'(..), the gradient in
// hidden weight^T + bias of sum_r grad[r] (lse[r] - target_logit[r]). 0 in column mask_id and in rows with a target < 0.
// weight, bias and dlogits may be a range of the vocabulary: a target >= its size is then none of the columns.
struct MaskedCrossEntropyBackwardArgs {
  Tensor dlogits;  // [rows, vocab], dtype of hidden; every element is written
  Tensor hidden, weight, bias, targets;
  Tensor lse;   // f32 [rows]
  Tensor grad;  // f32 [rows]
  int64_t mask_id = -1;
  float logit_softcap = 0.0f;
};

// The one list of ops: dispatch and bindings are generated from it.
#define ESOKERN_OPS(X)                                             \
  X(attention, AttentionArgs)                                      \
  X(attention_backward, AttentionBackwardArgs)                     \
  X(attention_with_kvcache, AttentionWithKvcacheArgs)              \
  X(unmask_sample, UnmaskSampleArgs)                               \
  X(unmask_select, UnmaskSelectArgs)                               \
  X(masked_cross_entropy, MaskedCrossEntropyArgs)                  \
  X(masked_cross_entropy_backward, MaskedCrossEntropyBackwardArgs) \
  X(fused_linear, FusedLinearArgs)                                 \
  X(add_norm, AddNormArgs)

namespace cpu {
#define ESOKERN_DECLARE(name, Args) void name(const Args& args);
ESOKERN_OPS(ESOKERN_DECLARE)
#undef ESOKERN_DECLARE
}  // namespace cpu

// On the GPU everything happens in the order of `stream` (a cudaStream_t of the current device) and nothing waits for
// the host. The caller allocates the scratch that a call says it needs, in the order of the same stream.
namespace cuda {
#define ESOKERN_DECLARE(name, Args)                       \
  int64_t name##_workspace(const Args& args); /* bytes */ \
  void name(const Args& args, void* workspace, void* stream);
ESOKERN_OPS(ESOKERN_DECLARE)
#undef ESOKERN_DECLARE
}  // namespace cuda

}  // namespace esokern
