// The host's side of attention: views, checks, scratch.
#include "cuda/attention_problem.h"

namespace esokern::cuda {

RowsView rows_view(const Tensor& t, bool packed) {
  if (!t.given()) return {};
  const int row = t.ndim - 3;
  ESOKERN_CHECK(t.shape[row + 2] <= 1 || t.stride[row + 2] == 1,
                "the last dimension (head_dim) must be contiguous, stride", t.stride[row + 2]);
  RowsView view = {t.data, packed ? 0 : t.stride[0], t.stride[row], t.stride[row + 1], false};
  const int64_t unit = t.dtype == DType::f32 ? 4 : 8;
  view.aligned = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && view.batch % unit == 0 &&
                 view.row % unit == 0 && view.head % unit == 0;
  return view;
}

IntsView ints_view(const Tensor& t, bool packed) {
  if (!t.given()) return {};
  return {t.ptr<int32_t>(), packed ? 0 : t.stride[0], t.stride[packed ? 0 : 1]};
}

AttentionProblem make_problem(const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k,
                              const Tensor& v, bool packed, int64_t batch, float softmax_scale) {
  const int64_t head_dim = q.shape[q.ndim - 1];
  ESOKERN_CHECK(head_dim % 8 == 0 && head_dim > 0 && head_dim <= 256,
                "head_dim: supported are multiples of 8 up to 256", head_dim);
  ESOKERN_CHECK(k.dtype == q.dtype && v.dtype == q.dtype && out.dtype == q.dtype,
                "q, k, v and out must have one dtype");
  ESOKERN_CHECK(k.shape[k.ndim - 2] > 0, "kv_heads must divide heads, kv_heads", k.shape[k.ndim - 2]);
  ESOKERN_CHECK(batch > 0 || q.shape[0] == 0, "rows of no sequence: cu_seqlens has one entry, rows",
                q.shape[0]);
  AttentionProblem p = {};
  p.out = rows_view(out, packed);
  p.q = rows_view(q, packed);
  p.k = rows_view(k, k.ndim == 3);
  p.v = rows_view(v, v.ndim == 3);
  p.lse = lse.ptr<float>();
  if (lse.given()) {
    p.lse_batch = packed ? 0 : lse.stride[0];
    p.lse_head = lse.stride[packed ? 0 : 1];
    p.lse_row = lse.stride[packed ? 1 : 2];
  }
  p.batch = batch;
  p.heads = q.shape[q.ndim - 2];
  p.kv_heads = k.shape[k.ndim - 2];
  p.group = p.heads / p.kv_heads;
  p.total_rows = packed ? q.shape[0] : q.shape[0] * q.shape[1];
  p.head_dim = static_cast<int32_t>(head_dim);
  const int64_t seqlen_q = q.shape[packed ? 0 : 1];
  ESOKERN_CHECK(seqlen_q * p.heads < INT32_MAX, "too many query rows for one sequence", seqlen_q);
  p.seqlen_q = static_cast<int32_t>(seqlen_q);
  p.packed = p.ragged = packed;
  p.packed_keys = k.ndim == 3;
  constexpr float kLog2e = 1.4426950408889634f;
  p.scale = softmax_scale == 0.0f ? 1.0f : kLog2e * (softmax_scale < 0.0f ? -softmax_scale : softmax_scale);
  p.query_factor = softmax_scale > 0.0f ? 1.0f : softmax_scale < 0.0f ? -1.0f : 0.0f;
  return p;
}

void plan_ranks(AttentionProblem* problem, Scratch* scratch) {
  AttentionProblem& p = *problem;
  if (p.k_rank.data == nullptr) return;
  const int64_t tiles = ceil_div(p.max_keys, kRankTile);
  p.rank_tiles = p.packed_keys ? 1 : tiles;
  p.rank_ranges = scratch->take<int32_t>(2 * (p.packed_keys ? tiles + p.batch : p.batch * tiles));
}

void plan_attention(AttentionProblem* problem, DType dtype, Scratch* scratch) {
  AttentionProblem& p = *problem;
  if (p.group == 0 || p.total_rows == 0 || p.batch == 0) return;
  plan_ranks(problem, scratch);
  const int64_t splits = most_splits(p, dtype);
  if (splits <= 1) return;
  // Rows of parts: of every lane, or of every sequence, whichever is less.
  const int64_t lanes = most_lanes(p), limit = dtype == DType::f32 ? 512 : 1024;  // of lanes times splits
  const int64_t per_sequence = lanes * splits < limit || lanes <= kFewLanes ? lanes * splits : limit;
  const int64_t by_lane = p.total_rows * p.group * splits, by_sequence = p.batch * per_sequence;
  if (p.packed && by_lane < by_sequence)
    p.part_lane = splits;
  else
    p.part_sequence = per_sequence;
  p.part_head = p.part_lane > 0 ? by_lane : by_sequence;
  p.part_out = scratch->take<float>(p.kv_heads * p.part_head * p.head_dim);
  p.part_lse = scratch->take<float>(p.kv_heads * p.part_head);
}

}  // namespace esokern::cuda
