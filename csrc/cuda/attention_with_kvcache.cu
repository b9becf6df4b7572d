// One step of cached attention: rotate q and k at their own positions, write k and v into the cache, attend, commit.
//   keys of sequence b: cache rows [0, cache_seqlens[b] + n_b), or [0, cache_seqlens[b]) with slots or without k
// Work: append_kernel checks every integer of a sequence, then writes its rows; each of its blocks checks again, which
// costs a few loads and saves a kernel. Then attention_kernel.cu; a last kernel commits. Sequences with a value out of
// range are left alone: nothing is written for them and their outputs are NaN.
// Memory: keys and values are read where they lie, contiguous or paged; queries are rotated into shared memory.
// Limits: float32, bfloat16, float16; head_dim a multiple of 8 up to 256; any page size.
// Source: Eso-LM sampling, arXiv 2506.01928 section 4.2 and Algorithm 3.
#include "cuda/attention_rows.cuh"
#include "cuda/dispatch.h"
#include "ops.h"

namespace esokern::cuda {
namespace {

constexpr int kAppendThreads = 128;
constexpr int kAppendItems = 8;  // pairs of elements per thread before another block is worth it

struct AppendProblem {
  AttentionProblem attention;
  RowsView new_k, new_v;  // nullptr = nothing to append
  IntsView cache_seqlens, seqused_q, num_clean, cache_batch_idx, cu_seqlens_q;
  IntsView slots;
  int64_t max_position, cache_rows;  // cache_rows: batch rows or pages of the cache
};

// Sequence b as the integers say, without looking whether they may be followed, except for its rows.
__device__ __forceinline__ Sequence read_sequence(const AppendProblem& a, int64_t b, bool* bad) {
  const AttentionProblem& p = a.attention;
  Sequence seq = {0, p.seqlen_q, 0, 0, a.cache_seqlens.at(0, b), 0, static_cast<int32_t>(b), 0};
  if (p.packed) {
    seq.first_query = a.cu_seqlens_q.at(0, b);
    seq.rows = a.cu_seqlens_q.at(0, b + 1) - seq.first_query;
  } else if (a.seqused_q.data != nullptr) {
    const int32_t rows = a.seqused_q.at(0, b);
    if (rows < 0 || rows > p.seqlen_q)
      *bad = true;
    else
      seq.rows = rows;
  }
  if (a.cache_batch_idx.data != nullptr) seq.cache_row = a.cache_batch_idx.at(0, b);
  seq.clean = a.num_clean.data != nullptr ? a.num_clean.at(0, b) : seq.rows;
  const int64_t keys = int64_t{seq.cached} + (p.append ? seq.rows : 0);
  *bad |= seq.cached < 0 || keys > p.max_keys || seq.clean < 0 || seq.clean > seq.rows;
  *bad |= p.pages == nullptr && (seq.cache_row < 0 || seq.cache_row >= a.cache_rows);
  seq.keys = *bad ? -1 : static_cast<int32_t>(keys);
  return seq;
}

// This thread's share of the values that are per row or page; the sequence itself is good.
__device__ __forceinline__ bool bad_rows(const AppendProblem& a, int64_t b, const Sequence& seq) {
  const AttentionProblem& p = a.attention;
  bool bad = false;
  const auto bad_page = [&](int64_t page) {
    const int32_t at = p.pages[b * p.pages_batch + page];
    return at < 0 || at >= a.cache_rows;
  };
  for (int64_t i = threadIdx.x; i < seq.rows; i += blockDim.x) {
    if (p.rotary.half > 0) {
      const int32_t position = p.rotary.positions.at(b, seq.first_query + i);
      bad |= position < 0 || position >= a.max_position;
    }
    if (a.slots.data == nullptr) continue;
    const int32_t slot = a.slots.at(b, seq.first_query + i);
    bad |= slot < -1 || slot >= p.max_keys;
    if (p.pages != nullptr && slot >= 0 && slot < p.max_keys) bad |= bad_page(slot / p.page_size);
  }
  if (p.pages != nullptr)
    for (int64_t page = threadIdx.x; page * p.page_size < seq.keys; page += blockDim.x) bad |= bad_page(page);
  return bad;
}

template <class T>
__device__ __forceinline__ T* cache_row(const AttentionProblem& p, const RowsView& cache, int64_t b,
                                        const Sequence& seq, int32_t row, int64_t head) {
  if (p.pages == nullptr) return row_of<T>(cache, seq.cache_row, row, head);
  return row_of<T>(cache, p.pages[b * p.pages_batch + row / p.page_size], row % p.page_size, head);
}

template <class T>
__global__ void __launch_bounds__(kAppendThreads) append_kernel(const AppendProblem a) {
  Arena arena;
  int32_t* votes = arena.take<int32_t>(kAppendThreads / kWarpSize);
  const AttentionProblem& p = a.attention;
  const int64_t b = blockIdx.x;
  Sequence seq;
  if (p.packed && block_any(bad_ends(a.cu_seqlens_q, p.batch, p.total_rows), votes)) {
    seq = all_bad_sequence(b, p.total_rows);
  } else {
    bool bad = false;
    seq = read_sequence(a, b, &bad);
    if (block_any(bad || bad_rows(a, b, seq), votes)) seq.keys = -1;
  }
  if (blockIdx.y == 0 && threadIdx.x == 0) p.sequences[b] = seq;
  if (seq.keys < 0 || a.new_k.data == nullptr) return;

  const int64_t per_row = p.kv_heads * p.head_dim;
  for (int64_t item = blockIdx.y * int64_t{kAppendThreads} + threadIdx.x; item < seq.rows * per_row;
       item += gridDim.y * int64_t{kAppendThreads}) {
    const int64_t i = item / per_row, head = item % per_row / p.head_dim;
    const int d = static_cast<int>(item % p.head_dim);
    const int64_t row = seq.first_query + i;
    const int32_t to = a.slots.data != nullptr ? a.slots.at(b, row) : seq.cached + static_cast<int32_t>(i);
    if (to < 0) continue;
    const T* key = row_of<T>(a.new_k, b, row, head);
    T* k_to = cache_row<T>(p, p.k, b, seq, to, head) + d;
    if (p.rotary.half > 0)
      *k_to = from_float<T>(rotated(p.rotary, key, d, p.rotary.positions.at(b, row)));
    else
      *k_to = key[d];
    cache_row<T>(p, p.v, b, seq, to, head)[d] = row_of<T>(a.new_v, b, row, head)[d];
  }
}

__global__ void __launch_bounds__(kAppendThreads)
    commit_kernel(const Sequence* sequences, int32_t* cache_seqlens, int64_t stride, int64_t batch) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kAppendThreads + threadIdx.x;
  if (b < batch && sequences[b].keys >= 0) cache_seqlens[b * stride] += sequences[b].clean;
}

struct Call {
  AppendProblem problem;
  int64_t bytes;
};
Call plan(const AttentionWithKvcacheArgs& a, void* workspace) {
  const bool packed = a.cu_seqlens_q.given(), paged = a.page_table.given();
  const int64_t batch = a.cache_seqlens.shape[0];
  Call call = {};
  AppendProblem& append = call.problem;
  AttentionProblem& p = append.attention;
  p = make_problem(a.out, a.lse, a.q, a.k_cache, a.v_cache, packed, batch, a.softmax_scale);
  p.ragged = packed || a.seqused_q.given();
  const int64_t capacity = a.k_cache.shape[1] * (paged ? a.page_table.shape[1] : 1);
  ESOKERN_CHECK(capacity < kMaxKeys, "too many rows of cache for one sequence", capacity);
  p.max_keys = static_cast<int32_t>(capacity);
  if (paged) {
    ESOKERN_CHECK(a.page_table.shape[1] <= 1 || a.page_table.stride[1] == 1,
                  "page_table: a row must be contiguous, stride", a.page_table.stride[1]);
    p.pages = a.page_table.ptr<int32_t>();
    p.pages_batch = a.page_table.stride[0];
    p.page_size = static_cast<int32_t>(a.k_cache.shape[1]);
  }
  p.chunk_mask = static_cast<int32_t>(a.chunk_mask);
  p.append = a.k.given() && !a.slots.given();
  p.k_rank = ints_view(a.k_rank, false);
  p.prefix_end = ints_view(a.prefix_end, packed);
  p.window_start = ints_view(a.window_start, packed);
  p.window_end = ints_view(a.window_end, packed);
  if (a.rotary_cos.given()) {
    const Tensor &cos = a.rotary_cos, &sin = a.rotary_sin;
    ESOKERN_CHECK(cos.dtype == sin.dtype &&
                      (cos.dtype == DType::f32 || cos.dtype == DType::bf16 || cos.dtype == DType::f16),
                  "rotary_cos and rotary_sin: supported are float32, bfloat16 and float16");
    p.rotary = {cos.data,
                sin.data,
                cos.dtype,
                static_cast<int>(cos.shape[1]),
                a.rotary_interleaved,
                cos.stride[0],
                cos.stride[1],
                sin.stride[0],
                sin.stride[1],
                ints_view(a.positions, packed)};
    append.max_position = cos.shape[0];
  }
  if (a.k.given()) {
    ESOKERN_CHECK(a.k.dtype == a.q.dtype && a.v.dtype == a.q.dtype, "k and v must have the dtype of q");
    append.new_k = rows_view(a.k, packed);
    append.new_v = rows_view(a.v, packed);
  }
  append.cache_seqlens = ints_view(a.cache_seqlens, true);
  append.seqused_q = ints_view(a.seqused_q, true);
  append.num_clean = ints_view(a.num_clean, true);
  append.cache_batch_idx = ints_view(a.cache_batch_idx, true);
  append.cu_seqlens_q = ints_view(a.cu_seqlens_q, true);
  append.slots = ints_view(a.slots, packed);
  append.cache_rows = a.k_cache.shape[0];

  Scratch scratch(workspace);
  p.sequences = scratch.take<Sequence>(batch);
  plan_attention(&p, a.q.dtype, &scratch);
  call.bytes = scratch.bytes();
  return call;
}

}  // namespace

int64_t attention_with_kvcache_workspace(const AttentionWithKvcacheArgs& args) {
  return plan(args, nullptr).bytes;
}

void attention_with_kvcache(const AttentionWithKvcacheArgs& args, void* workspace, void* stream) {
  const AppendProblem problem = plan(args, workspace).problem;
  const AttentionProblem& p = problem.attention;
  if (p.batch == 0) return;
  const int64_t per_block = kAppendThreads * kAppendItems;
  const int64_t blocks = (p.seqlen_q * p.kv_heads * p.head_dim + per_block - 1) / per_block;
  const int64_t most = args.k.given() ? 256 : 1;
  dispatch_dtype(args.q.dtype, [&]<class T>() {
    launch("attention_append", append_kernel<T>,
           Grid{p.batch, blocks < 1      ? 1
                         : blocks < most ? blocks
                                         : most},
           kAppendThreads, 128, stream, problem);
  });
  run_attention(p, args.q.dtype, stream);
  if (args.commit)
    launch("attention_commit", commit_kernel, Grid{(p.batch + kAppendThreads - 1) / kAppendThreads},
           kAppendThreads, 0, stream, p.sequences, args.cache_seqlens.ptr<int32_t>(),
           args.cache_seqlens.stride[0], p.batch);
}

}  // namespace esokern::cuda
