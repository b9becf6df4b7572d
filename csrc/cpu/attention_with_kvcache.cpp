// One step of cached attention: rotate q and k at their own positions, write k and v into the cache, attend,
// commit.
//   keys of sequence b: cache rows [0, cache_seqlens[b] + n_b), or [0, cache_seqlens[b]) with slots or
//   without k
// Work: every integer is checked before anything is written; rows are written (in parallel when there are
// many); then attention_driver.h. Memory: keys and values are read where they lie, contiguous or paged;
// queries are rotated on the stack. Limits: float32, bfloat16, float16; head_dim a multiple of 8 up to 256;
// any page size. Source: Eso-LM sampling, arXiv 2506.01928 section 4.2 and Algorithm 3.
#include "cpu/attention_driver.h"
#include "cpu/dispatch_dtype.h"

namespace esokern::cpu::ESOKERN_ISA {
namespace {

constexpr int64_t kSerialWrites =
    1 << 14;  // elements below which a second fork of threads costs more than the copy

template <class T>
struct CachedAttention {
  const AttentionWithKvcacheArgs& a;
  int64_t batch, heads, kv_heads, page_size, capacity;
  int head_dim, rotary_half;
  bool packed, append;

  explicit CachedAttention(const AttentionWithKvcacheArgs& args) : a(args) {
    packed = a.cu_seqlens_q.given();
    append = a.k.given() && !a.slots.given();
    batch = a.cache_seqlens.shape[0];
    heads = a.q.shape[a.q.ndim - 2];
    kv_heads = a.k_cache.shape[2];
    head_dim = static_cast<int>(a.q.shape[a.q.ndim - 1]);
    rotary_half = a.rotary_cos.given() ? static_cast<int>(a.rotary_cos.shape[1]) : 0;
    page_size = a.k_cache.shape[1];
    capacity = a.page_table.given() ? page_size * a.page_table.shape[1] : page_size;
    check_dtypes<T>({a.out, a.q, a.k_cache, a.v_cache, a.k, a.v});
    check_dtypes<float>({a.lse});
    check_dtypes<int32_t>({a.cache_seqlens, a.positions, a.num_clean, a.slots, a.page_table,
                           a.cache_batch_idx, a.cu_seqlens_q, a.seqused_q, a.k_rank, a.prefix_end,
                           a.window_start, a.window_end});
  }

  static int32_t entry(const Tensor& t, int64_t b) {
    return static_cast<const int32_t*>(t.data)[b * t.stride[0]];
  }
  int64_t first(int64_t b) const { return entry(a.cu_seqlens_q, b); }
  int64_t rows(int64_t b) const {
    if (packed) return first(b + 1) - first(b);
    return a.seqused_q.given() ? entry(a.seqused_q, b) : a.q.shape[1];
  }
  int64_t cached(int64_t b) const { return entry(a.cache_seqlens, b); }
  int64_t clean(int64_t b) const { return a.num_clean.given() ? entry(a.num_clean, b) : rows(b); }
  int64_t key_count(int64_t b) const { return cached(b) + (append ? rows(b) : 0); }

  int64_t offset(const Tensor& t, int64_t b, int64_t i, int64_t head) const {
    return packed ? (first(b) + i) * t.stride[0] + head * t.stride[1]
                  : b * t.stride[0] + i * t.stride[1] + head * t.stride[2];
  }
  // Entry of an i32 tensor [batch, seqlen_q] or [total_q].
  int32_t per_row(const Tensor& t, int64_t b, int64_t i) const {
    const int32_t* data = static_cast<const int32_t*>(t.data);
    return packed ? data[(first(b) + i) * t.stride[0]] : data[b * t.stride[0] + i * t.stride[1]];
  }
  int64_t slot(int64_t b, int64_t i) const {
    return a.slots.given() ? per_row(a.slots, b, i) : cached(b) + i;
  }
  int32_t page(int64_t b, int64_t index) const {
    return a.page_table.ptr<int32_t>()[b * a.page_table.stride[0] + index * a.page_table.stride[1]];
  }
  int64_t cache_row(int64_t b) const { return a.cache_batch_idx.given() ? entry(a.cache_batch_idx, b) : b; }

  T* cache_ptr(const Tensor& cache, int64_t b, int64_t row, int64_t kv_head) const {
    const int64_t outer = a.page_table.given() ? page(b, row / page_size) : cache_row(b);
    const int64_t inner = a.page_table.given() ? row % page_size : row;
    return cache.ptr<T>() + outer * cache.stride[0] + inner * cache.stride[1] + kv_head * cache.stride[2];
  }

  void check() const {
    if (packed)
      check_cu_seqlens(a.cu_seqlens_q.ptr<int32_t>(), batch, a.cu_seqlens_q.stride[0], a.q.shape[0]);
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t n = rows(b);
      ESOKERN_CHECK(n >= 0 && (packed || n <= a.q.shape[1]), "seqused_q out of range", n);
      ESOKERN_CHECK(cached(b) >= 0 && key_count(b) <= capacity,
                    "cache_seqlens: the cache would overflow, rows", key_count(b));
      ESOKERN_CHECK(clean(b) >= 0 && clean(b) <= n, "num_clean out of range", clean(b));
      if (!a.page_table.given())
        ESOKERN_CHECK(cache_row(b) >= 0 && cache_row(b) < a.k_cache.shape[0], "cache_batch_idx out of range",
                      cache_row(b));
      else
        for (int64_t i = 0; i * page_size < key_count(b); ++i) check_page(b, i);
      for (int64_t i = 0; i < n; ++i) {
        if (rotary_half > 0) {
          const int64_t position = per_row(a.positions, b, i);
          ESOKERN_CHECK(position >= 0 && position < a.rotary_cos.shape[0], "positions out of range",
                        position);
        }
        if (!a.slots.given()) continue;
        const int64_t to = slot(b, i);
        ESOKERN_CHECK(to >= -1 && to < capacity, "slots out of range", to);
        if (to >= 0 && a.page_table.given()) check_page(b, to / page_size);
      }
    }
  }
  void check_page(int64_t b, int64_t index) const {
    ESOKERN_CHECK(page(b, index) >= 0 && page(b, index) < a.k_cache.shape[0], "page_table entry out of range",
                  page(b, index));
  }

  static float table(const Tensor& t, int64_t position, int64_t column) {
    const int64_t at = position * t.stride[0] + column * t.stride[1];
    if (t.dtype == DType::f32) return static_cast<const float*>(t.data)[at];
    if (t.dtype == DType::bf16) return to_float(static_cast<const bf16*>(t.data)[at]);
    return to_float(static_cast<const f16*>(t.data)[at]);
  }
  // row = the rotated `from`, both [head_dim].
  void rotate(const T* from, int64_t b, int64_t i, float* row) const {
    for (int d = 0; d < head_dim; ++d) row[d] = to_float(from[d]);
    if (rotary_half == 0) return;
    const int64_t position = per_row(a.positions, b, i);
    const int step = a.rotary_interleaved ? 2 : 1, pair = a.rotary_interleaved ? 1 : rotary_half;
    for (int c = 0; c < rotary_half; ++c) {
      const float cos = table(a.rotary_cos, position, c), sin = table(a.rotary_sin, position, c);
      const float x = row[c * step], y = row[c * step + pair];
      row[c * step] = x * cos - y * sin;
      row[c * step + pair] = y * cos + x * sin;
    }
  }

  void write_row(int64_t b, int64_t i) const {
    const int64_t to = slot(b, i);
    if (to < 0) return;
    float row[kMaxHeadDim];
    for (int64_t head = 0; head < kv_heads; ++head) {
      rotate(a.k.ptr<T>() + offset(a.k, b, i, head), b, i, row);
      T* k_row = cache_ptr(a.k_cache, b, to, head);
      for (int d = 0; d < head_dim; ++d) from_float(row[d], k_row + d);
      __builtin_memcpy(cache_ptr(a.v_cache, b, to, head), a.v.ptr<T>() + offset(a.v, b, i, head),
                       head_dim * sizeof(T));
    }
  }
  void write() const {
    if (!a.k.given()) return;
    const auto write_sequence = [&](int64_t b) {
      for (int64_t i = 0; i < rows(b); ++i) write_row(b, i);
    };
    int64_t most = 0;
    for (int64_t b = 0; b < batch; ++b) most = rows(b) > most ? rows(b) : most;
    if (batch * most * kv_heads * head_dim <= kSerialWrites) {
      for (int64_t b = 0; b < batch; ++b) write_sequence(b);
    } else if (most > batch) {
      for (int64_t b = 0; b < batch; ++b) parallel_for(rows(b), [&](int64_t i) { write_row(b, i); });
    } else {
      parallel_for(batch, write_sequence);
    }
  }

  Keys<T> keys(int64_t b, int64_t kv_head) const {
    Keys<T> keys{};
    const int64_t outer = a.page_table.given() ? 0 : cache_row(b);
    keys.k = a.k_cache.ptr<T>() + outer * a.k_cache.stride[0] + kv_head * a.k_cache.stride[2];
    keys.v = a.v_cache.ptr<T>() + outer * a.v_cache.stride[0] + kv_head * a.v_cache.stride[2];
    keys.k_row_stride = a.k_cache.stride[1];
    keys.v_row_stride = a.v_cache.stride[1];
    if (a.page_table.given()) {
      keys.pages = a.page_table.ptr<int32_t>() + b * a.page_table.stride[0];
      keys.page_size = page_size;
      keys.k_page_stride = a.k_cache.stride[0];
      keys.v_page_stride = a.v_cache.stride[0];
    }
    if (a.k_rank.given()) {
      keys.rank = a.k_rank.ptr<int32_t>() + b * a.k_rank.stride[0];
      keys.rank_stride = a.k_rank.stride[1];
    }
    keys.count = static_cast<int32_t>(key_count(b));
    return keys;
  }
  QueryRange range(int64_t b, int64_t i) const {
    if (a.chunk_mask == static_cast<int64_t>(ChunkMask::explicit_rank)) {
      if (!a.window_start.given()) return {per_row(a.prefix_end, b, i), 0, -1};
      return {per_row(a.prefix_end, b, i), per_row(a.window_start, b, i), per_row(a.window_end, b, i)};
    }
    const int32_t appended = append ? static_cast<int32_t>(rows(b)) : 0;
    if (!append) return {static_cast<int32_t>(cached(b)) - 1, 0, -1};
    return chunk_query_range(a.chunk_mask, static_cast<int32_t>(cached(b)), appended,
                             static_cast<int32_t>(clean(b)), static_cast<int32_t>(i));
  }
  float scale() const { return a.softmax_scale * kLog2e; }
  void query(int64_t b, int64_t i, int64_t head, float* row) const {
    rotate(a.q.ptr<T>() + offset(a.q, b, i, head), b, i, row);
  }
  void store(int64_t b, int64_t i, int64_t head, const float* row, float lse) const {
    T* to = a.out.ptr<T>() + offset(a.out, b, i, head);
    for (int d = 0; d < head_dim; ++d) from_float(row[d], to + d);
    if (!a.lse.given()) return;
    float* lse_data = a.lse.ptr<float>();
    if (packed)
      lse_data[head * a.lse.stride[0] + (first(b) + i) * a.lse.stride[1]] = lse;
    else
      lse_data[b * a.lse.stride[0] + head * a.lse.stride[1] + i * a.lse.stride[2]] = lse;
  }

  void run() const {
    check();
    write();
    run_attention<T>(*this);
    if (!a.commit) return;
    for (int64_t b = 0; b < batch; ++b)
      a.cache_seqlens.ptr<int32_t>()[b * a.cache_seqlens.stride[0]] += static_cast<int32_t>(clean(b));
  }
};

}  // namespace

void attention_with_kvcache(const AttentionWithKvcacheArgs& args) {
  check_layout(args.q);
  check_layout(args.out);
  check_layout(args.k_cache);
  check_layout(args.v_cache);
  if (args.k.given()) {
    check_layout(args.k);
    check_layout(args.v);
  }
  if (args.page_table.given())
    ESOKERN_CHECK(args.page_table.shape[1] <= 1 || args.page_table.stride[1] == 1,
                  "page_table: a row must be contiguous, stride", args.page_table.stride[1]);
  dispatch_dtype(args.q.dtype, [&](auto type) { CachedAttention<decltype(type)>(args).run(); });
}

}  // namespace esokern::cpu::ESOKERN_ISA
