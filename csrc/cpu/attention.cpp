// Attention of whole sequences under a rank-integer mask:
//   out_i = sum_j softmax_j(softmax_scale q_i . k_j) v_j over visible(i, j)     (common/mask.h)
// Work and memory: attention_driver.h, attention_many_rows.h, attention_few_rows.h. Tiles of keys that no
// query of a group of 16 sees are skipped, those that all see are taken without masking; long sequences are visited in the
// order of their ranks for that (attention_order.h). Limits: float32, bfloat16, float16; head_dim a multiple of 8 up to
// 256.
#include "cpu/attention_driver.h"
#include "cpu/attention_order.h"
#include "cpu/dispatch_dtype.h"

namespace esokern::cpu::ESOKERN_ISA {
namespace {

constexpr int64_t kSortedRows = 128;  // from so many query rows on, sorting costs little beside attention

template <class T>
struct Attention {
  const AttentionArgs& a;
  const bool packed;
  const int64_t batch;
  const Scratch<int32_t> q_order, k_order, spare;  // of all rows, keys, both; sorted sequences fill theirs
  int64_t heads, kv_heads;
  int head_dim;

  explicit Attention(const AttentionArgs& args)
      : a(args),
        packed(args.cu_seqlens_q.given()),
        batch(packed ? a.cu_seqlens_q.shape[0] - 1 : a.q.shape[0]),
        q_order(sorts() ? first_row(batch) : 0),
        k_order(sorts() ? first_key(batch) : 0),
        spare(sorts() ? first_row(batch) + first_key(batch) : 0) {
    heads = a.q.shape[a.q.ndim - 2];
    kv_heads = a.k.shape[a.k.ndim - 2];
    head_dim = static_cast<int>(a.q.shape[a.q.ndim - 1]);
    check_dtypes<T>({a.out, a.q, a.k, a.v});
    check_dtypes<float>({a.lse});
    check_dtypes<int32_t>({a.k_rank, a.prefix_end, a.window_start, a.window_end});
    if (sorts()) parallel_for(batch, [&](int64_t b) { sort(b); });
  }

  // Places of a sequence among the rows and keys of all.
  int64_t first_row(int64_t b) const { return packed ? first(a.cu_seqlens_q, b) : b * a.q.shape[1]; }
  int64_t first_key(int64_t b) const { return packed ? first(a.cu_seqlens_k, b) : b * a.k.shape[1]; }
  bool sorts() const { return a.k_rank.given() && a.q.shape[packed ? 0 : 1] >= kSortedRows; }
  bool sorts(int64_t b) const { return sorts() && rows(b) >= kSortedRows; }
  void sort(int64_t b) const {
    if (!sorts(b)) return;
    const SequenceMask mask(a, b, packed ? first_row(b) : 0, packed ? first_key(b) : 0);
    mask.sort_queries(q_order.data + first_row(b), spare.data + first_row(b), rows(b));
    mask.sort_keys(k_order.data + first_key(b), spare.data + first_row(batch) + first_key(b),
                   first_key(b + 1) - first_key(b));
  }
  // Which row of sequence b comes i-th.
  int64_t row(int64_t b, int64_t i) const { return sorts(b) ? q_order.data[first_row(b) + i] : i; }

  // First row of sequence b in a packed tensor.
  int64_t first(const Tensor& cu_seqlens, int64_t b) const {
    return cu_seqlens.ptr<int32_t>()[b * cu_seqlens.stride[0]];
  }
  int64_t rows(int64_t b) const {
    return packed ? first(a.cu_seqlens_q, b + 1) - first(a.cu_seqlens_q, b) : a.q.shape[1];
  }
  // Offset of element (b, i, head) of a [batch, seqlen, heads, ...] or packed tensor.
  int64_t offset(const Tensor& t, const Tensor& cu_seqlens, int64_t b, int64_t i, int64_t head) const {
    return packed ? (first(cu_seqlens, b) + i) * t.stride[0] + head * t.stride[1]
                  : b * t.stride[0] + i * t.stride[1] + head * t.stride[2];
  }
  int32_t bound(const Tensor& t, int64_t b, int64_t i) const {
    const int32_t* data = static_cast<const int32_t*>(t.data);
    return packed ? data[(first(a.cu_seqlens_q, b) + i) * t.stride[0]]
                  : data[b * t.stride[0] + i * t.stride[1]];
  }

  Keys<T> keys(int64_t b, int64_t kv_head) const {
    Keys<T> keys{};
    keys.k = a.k.ptr<T>() + offset(a.k, a.cu_seqlens_k, b, 0, kv_head);
    keys.v = a.v.ptr<T>() + offset(a.v, a.cu_seqlens_k, b, 0, kv_head);
    keys.k_row_stride = a.k.stride[packed ? 0 : 1];
    keys.v_row_stride = a.v.stride[packed ? 0 : 1];
    keys.count =
        static_cast<int32_t>(packed ? first(a.cu_seqlens_k, b + 1) - first(a.cu_seqlens_k, b) : a.k.shape[1]);
    if (a.k_rank.given()) {
      const int64_t start = packed ? first(a.cu_seqlens_k, b) * a.k_rank.stride[0] : b * a.k_rank.stride[0];
      keys.rank = a.k_rank.ptr<int32_t>() + start;
      keys.rank_stride = a.k_rank.stride[packed ? 0 : 1];
    }
    if (sorts(b)) keys.order = k_order.data + first_key(b);
    return keys;
  }
  QueryRange range(int64_t b, int64_t place) const {
    const int64_t i = row(b, place);
    if (!a.k_rank.given()) return {INT32_MAX, 0, -1};
    if (!a.window_start.given()) return {bound(a.prefix_end, b, i), 0, -1};
    return {bound(a.prefix_end, b, i), bound(a.window_start, b, i), bound(a.window_end, b, i)};
  }
  float scale() const { return a.softmax_scale * kLog2e; }
  void query(int64_t b, int64_t place, int64_t head, float* values) const {
    const T* from = a.q.ptr<T>() + offset(a.q, a.cu_seqlens_q, b, row(b, place), head);
    for (int d = 0; d < head_dim; ++d) values[d] = to_float(from[d]);
  }
  void store(int64_t b, int64_t place, int64_t head, const float* values, float lse) const {
    const int64_t i = row(b, place);
    T* to = a.out.ptr<T>() + offset(a.out, a.cu_seqlens_q, b, i, head);
    for (int d = 0; d < head_dim; ++d) from_float(values[d], to + d);
    if (!a.lse.given()) return;
    float* lse_data = a.lse.ptr<float>();
    if (packed)
      lse_data[head * a.lse.stride[0] + (first(a.cu_seqlens_q, b) + i) * a.lse.stride[1]] = lse;
    else
      lse_data[b * a.lse.stride[0] + head * a.lse.stride[1] + i * a.lse.stride[2]] = lse;
  }
};

}  // namespace

void attention(const AttentionArgs& args) {
  check_layout(args.q);
  check_layout(args.k);
  check_layout(args.v);
  check_layout(args.out);
  if (args.cu_seqlens_q.given()) {
    const int64_t batch = args.cu_seqlens_q.shape[0] - 1;
    check_cu_seqlens(args.cu_seqlens_q.ptr<int32_t>(), batch, args.cu_seqlens_q.stride[0], args.q.shape[0]);
    check_cu_seqlens(args.cu_seqlens_k.ptr<int32_t>(), batch, args.cu_seqlens_k.stride[0], args.k.shape[0]);
  }
  dispatch_dtype(args.q.dtype, [&](auto type) {
    using T = decltype(type);
    run_attention<T>(Attention<T>(args));
  });
}

}  // namespace esokern::cpu::ESOKERN_ISA
