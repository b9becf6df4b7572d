// What both back ends check of attention_backward: shapes, dtypes and strides, so it serves host and device memory.
// Functions have internal linkage (see common/hd.h).
#pragma once

#include "ops.h"

namespace esokern {

static inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int d = 0; d < a.ndim; ++d)
    if (a.shape[d] != b.shape[d]) return false;
  return true;
}

// Not given, or [batch, seqlen] (packed: [tokens]) like the rows of `rows`.
static inline bool is_per_row(const Tensor& t, const Tensor& rows) {
  if (!t.given()) return true;
  if (t.ndim != rows.ndim - 2) return false;
  for (int d = 0; d < t.ndim; ++d)
    if (t.shape[d] != rows.shape[d]) return false;
  return true;
}

static inline void check_args(const AttentionBackwardArgs& args) {
  const Tensor &q = args.q, &k = args.k;
  const bool packed = args.cu_seqlens_q.given();
  ESOKERN_CHECK(packed == args.cu_seqlens_k.given() &&
                    (!packed || (args.cu_seqlens_q.ndim == 1 && args.cu_seqlens_q.shape[0] > 0 &&
                                 same_shape(args.cu_seqlens_q, args.cu_seqlens_k))),
                "attention_backward: cu_seqlens_q and cu_seqlens_k go together and are [batch + 1]");
  ESOKERN_CHECK(q.ndim == (packed ? 3 : 4) && k.ndim == q.ndim && (packed || q.shape[0] == k.shape[0]),
                "attention_backward: q and k must be [batch, seqlen, heads, head_dim], with cu_seqlens "
                "[tokens, heads, head_dim]; dimensions of q",
                q.ndim);
  ESOKERN_CHECK(same_shape(args.dq, q) && same_shape(args.out, q) && same_shape(args.dout, q),
                "attention_backward: dq, out and dout must have the shape of q");
  ESOKERN_CHECK(same_shape(args.v, k) && same_shape(args.dk, k) && same_shape(args.dv, k),
                "attention_backward: v, dk and dv must have the shape of k");
  const int64_t heads = q.shape[q.ndim - 2], kv_heads = k.shape[k.ndim - 2];
  const int64_t head_dim = q.shape[q.ndim - 1];
  ESOKERN_CHECK(head_dim % 8 == 0 && head_dim > 0 && head_dim <= 256 && k.shape[k.ndim - 1] == head_dim,
                "attention_backward: head_dim: supported are multiples of 8 up to 256, in q and k alike",
                head_dim);
  ESOKERN_CHECK(kv_heads > 0 && heads % kv_heads == 0,
                "attention_backward: kv_heads must divide heads, kv_heads", kv_heads);

  const Tensor* const floats[] = {&args.dq, &args.dk, &args.dv, &q, &k, &args.v, &args.out, &args.dout};
  for (const Tensor* t : floats) {
    ESOKERN_CHECK(t->dtype == q.dtype,
                  "attention_backward: q, k, v, out, dout and gradients must have one dtype");
    ESOKERN_CHECK(t->stride[t->ndim - 1] == 1,
                  "attention_backward: the last dimension (head_dim) must be contiguous, stride",
                  t->stride[t->ndim - 1]);
  }
  const Tensor* const sums[] = {&args.lse, &args.dlse};
  for (const Tensor* t : sums) {
    if (!t->given() && t == &args.dlse) continue;
    ESOKERN_CHECK(t->ndim == q.ndim - 1 && t->shape[packed ? 0 : 1] == heads &&
                      t->shape[packed ? 1 : 2] == q.shape[packed ? 0 : 1] &&
                      (packed || t->shape[0] == q.shape[0]),
                  "attention_backward: lse and dlse must be [batch, heads, seqlen_q], with cu_seqlens "
                  "[heads, total_q]");
  }

  ESOKERN_CHECK(args.k_rank.given() == args.prefix_end.given(),
                "attention_backward: k_rank and prefix_end go together");
  ESOKERN_CHECK(args.window_start.given() == args.window_end.given() &&
                    (args.prefix_end.given() || !args.window_start.given()),
                "attention_backward: window_start and window_end go together, and with prefix_end");
  ESOKERN_CHECK(is_per_row(args.k_rank, k),
                "attention_backward: k_rank must be [batch, seqlen_kv], with cu_seqlens [total_k]");
  ESOKERN_CHECK(
      is_per_row(args.prefix_end, q) && is_per_row(args.window_start, q) && is_per_row(args.window_end, q),
      "attention_backward: prefix_end, window_start and window_end must be [batch, seqlen_q], with "
      "cu_seqlens [total_q]");

  // ptr() refuses a wrong dtype: here, where an exception can still travel.
  for (const Tensor* t : sums) t->ptr<float>();
  const Tensor* const integers[] = {&args.cu_seqlens_q, &args.cu_seqlens_k, &args.k_rank,
                                    &args.prefix_end,   &args.window_start, &args.window_end};
  for (const Tensor* t : integers) t->ptr<int32_t>();
}

}  // namespace esokern
