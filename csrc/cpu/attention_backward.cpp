// Gradients of attention under a rank-integer mask, from q, k, v, out and lse (ops.h has the formulas): the weights are
// computed again, tile by tile (arXiv 2307.08691, section 3.1.2).
//
// Work: 10 head_dim operations per pair (query, key) in tiles of 64 x 64 that are not wholly hidden. Keys are visited in
//   the order of their ranks and queries in the order of how far they see (attention_order.h), and a tile counts as
//   hidden only if no pair in it is visible, so tokens in any order cost what they cost in sorted order.
// Memory: a task has the keys of one kv head, or, of more than 1024 keys, one of up to 8 parts of them. Blocks of dk and
//   dv belong to it; dq it adds up in float32, per thread, or where there are parts in scratch of the size of q times
//   their number, which are added in a fixed order at the end.
// Limits: float32, bfloat16, float16; head_dim a multiple of 8 up to 256. Always deterministic.
#include "check_attention.h"
#include "cpu/attention_backward_tile.h"
#include "cpu/attention_driver.h"
#include "cpu/attention_order.h"
#include "cpu/dispatch_dtype.h"

namespace esokern::cpu::ESOKERN_ISA {
namespace {

constexpr int64_t kPartKeys = 1024, kMostParts = 8;

// One sequence, and its places in the arrays of the call.
struct Sequence {
  int64_t first_row, rows, first_key, keys;  // first_*: places in packed tensors, 0 in padded ones
  int64_t row_at, key_at;                    // places in sorted arrays, each sequence on whole blocks
  int64_t parts, part_keys;
  int64_t first_task;
  int64_t dq_at;  // if there are parts: of [heads][parts][rows, rounded up to 8][padded_dim]
};

template <class T>
struct Backward {
  const AttentionBackwardArgs& a;
  const bool packed;
  const int64_t batch, heads, kv_heads, group;
  const int head_dim, padded_dim;
  int64_t task_part = 0;              // floats of dq that a task keeps to itself, where its keys are no part
  const Scratch<Sequence> sequences;  // and one more: the totals
  const Sequence& total;
  // Sorted: [rows] or [keys] of all sequences, [heads][rows].
  const Scratch<int32_t> q_order, prefix_end, window_start, window_end, k_order, rank, spare;
  const Scratch<float> lse, delta, dq, tiles;

  explicit Backward(const AttentionBackwardArgs& args)
      : a(args),
        packed(args.cu_seqlens_q.given()),
        batch(packed ? a.cu_seqlens_q.shape[0] - 1 : a.q.shape[0]),
        heads(a.q.shape[a.q.ndim - 2]),
        kv_heads(a.k.shape[a.k.ndim - 2]),
        group(heads / kv_heads),
        head_dim(static_cast<int>(a.q.shape[a.q.ndim - 1])),
        padded_dim(static_cast<int>(round_up(head_dim, 16))),
        sequences(batch + 1),
        total(plan()),
        q_order(total.row_at),
        prefix_end(total.row_at),
        window_start(total.row_at),
        window_end(total.row_at),
        k_order(total.key_at),
        rank(total.key_at),
        spare(total.row_at + total.key_at),
        lse(heads * total.row_at),
        delta(heads * total.row_at),
        dq(total.dq_at + max_threads() * task_part),
        tiles(max_threads() * BackwardTile<T>::memory_size(head_dim)) {}

  const Sequence& plan() {
    Sequence at = {};
    for (int64_t b = 0; b <= batch; ++b) {
      at.rows = b == batch ? 0
                : packed   ? ends(a.cu_seqlens_q).at(b + 1) - ends(a.cu_seqlens_q).at(b)
                           : a.q.shape[1];
      at.keys = b == batch ? 0
                : packed   ? ends(a.cu_seqlens_k).at(b + 1) - ends(a.cu_seqlens_k).at(b)
                           : a.k.shape[1];
      const int64_t wanted = (at.keys + kPartKeys - 1) / kPartKeys;
      at.parts = wanted < 1 ? 1 : wanted < kMostParts ? wanted : kMostParts;
      at.part_keys = round_up((at.keys + at.parts - 1) / at.parts, kBlockKeys);
      sequences.data[b] = at;
      at.row_at += round_up(at.rows, kBlockQueries);
      at.key_at += round_up(at.keys, kBlockKeys);
      at.first_task += kv_heads * at.parts;
      if (at.parts > 1)
        at.dq_at += heads * part_size(at) * at.parts;
      else
        task_part = group * part_size(at) > task_part ? group * part_size(at) : task_part;
      if (packed) at.first_row += at.rows, at.first_key += at.keys;
    }
    return sequences.data[batch];
  }
  int64_t part_size(const Sequence& s) const { return round_up(s.rows, 8) * padded_dim; }
  Ints ends(const Tensor& cu_seqlens) const { return {cu_seqlens.ptr<int32_t>(), cu_seqlens.stride[0]}; }

  template <class U>
  Rows<U> rows(const Tensor& t, int64_t b, int64_t first) const {
    U* data = static_cast<U*>(t.data);
    return packed ? Rows<U>{data + first * t.stride[0], t.stride[0], t.stride[1]}
                  : Rows<U>{data + b * t.stride[0], t.stride[1], t.stride[2]};
  }
  // lse and dlse: heads before rows.
  Rows<const float> sums(const Tensor& t, int64_t b, int64_t first) const {
    const float* data = static_cast<const float*>(t.data);
    return packed ? Rows<const float>{data + first * t.stride[1], t.stride[1], t.stride[0]}
                  : Rows<const float>{data + b * t.stride[0], t.stride[2], t.stride[1]};
  }

  void sort(int64_t b) const {
    const Sequence& s = sequences.data[b];
    const SequenceMask mask(a, b, s.first_row, s.first_key);
    int32_t *queries = q_order.data + s.row_at, *keys = k_order.data + s.key_at;
    mask.sort_queries(queries, spare.data + s.row_at, s.rows);
    mask.sort_keys(keys, spare.data + total.row_at + s.key_at, s.keys);
    for (int64_t i = 0; i < round_up(s.rows, kBlockQueries); ++i) {
      const QueryRange range = i < s.rows ? mask.range(queries[i]) : QueryRange{INT32_MIN, 0, -1};
      prefix_end.data[s.row_at + i] = range.prefix_end;
      window_start.data[s.row_at + i] = range.window_start;
      window_end.data[s.row_at + i] = range.window_end;
    }
    for (int64_t j = 0; j < round_up(s.keys, kBlockKeys); ++j)
      rank.data[s.key_at + j] = j < s.keys ? mask.rank(keys[j]) : 0;
  }

  // lse and delta of one head, 0 for rows that see nothing: no infinity enters a tile. delta adds in the order in which
  // block_gemm computes dout v^T, so that they cancel where one key has all the weight.
  void sum_rows(int64_t b, int64_t head) const {
    constexpr int kChains = 8;  // rows at once: additions of one wait for each other
    const Sequence& s = sequences.data[b];
    const Rows<const T> out = rows<const T>(a.out, b, s.first_row),
                        dout = rows<const T>(a.dout, b, s.first_row);
    const Rows<const float> lse_in = sums(a.lse, b, s.first_row), dlse = sums(a.dlse, b, s.first_row);
    const int64_t at = head * total.row_at + s.row_at;
    alignas(64) float x[kChains][kMaxHeadDim] = {}, y[kChains][kMaxHeadDim] = {};
    for (int64_t i = 0; i < round_up(s.rows, kBlockQueries); i += kChains) {
      for (int64_t r = 0; r < kChains && i + r < s.rows; ++r) {
        stage_row(x[r], out.at(q_order.data[s.row_at + i + r], head), head_dim);
        stage_row(y[r], dout.at(q_order.data[s.row_at + i + r], head), head_dim);
      }
      float sum[kChains] = {};
      for (int d = 0; d < head_dim && i < s.rows; d += kShortSum) {
        Vec part[kChains] = {};
        for (int e = d; e < head_dim && e < d + kShortSum; ++e)
#pragma GCC unroll 8
          for (int r = 0; r < kChains; ++r) part[r] = fma(splat(y[r][e]), splat(x[r][e]), part[r]);
        for (int r = 0; r < kChains; ++r) sum[r] += part[r][0];
      }
      for (int64_t r = 0; r < kChains; ++r) {
        lse.data[at + i + r] = delta.data[at + i + r] = 0.0f;
        if (i + r >= s.rows) continue;
        const int64_t row = q_order.data[s.row_at + i + r];
        if (*lse_in.at(row, head) == kNegInf) continue;
        lse.data[at + i + r] = *lse_in.at(row, head);
        delta.data[at + i + r] = sum[r] - (a.dlse.given() ? *dlse.at(row, head) : 0.0f);
      }
    }
  }

  QueryBlock query_block(const Sequence& s, int64_t i, int64_t head) const {
    const int64_t at = s.row_at + i, number = head * total.row_at + at;
    const int64_t left = s.rows - i;
    return {q_order.data + at,
            prefix_end.data + at,
            window_start.data + at,
            window_end.data + at,
            lse.data + number,
            delta.data + number,
            static_cast<int>(left < kBlockQueries ? left : kBlockQueries)};
  }

  // Where a task adds up dq.
  float* dq_part(const Sequence& s, int64_t head, int64_t part) const {
    if (s.parts == 1) return dq.data + total.dq_at + thread_index() * task_part + head % group * part_size(s);
    return dq.data + s.dq_at + (head * s.parts + part) * part_size(s);
  }

  // dk and dv of a part of the keys of one kv head, and its part of dq.
  void differentiate(int64_t b, int64_t kv_head, int64_t part) const {
    const Sequence& s = sequences.data[b];
    const Rows<const T> q = rows<const T>(a.q, b, s.first_row), dout = rows<const T>(a.dout, b, s.first_row);
    const Rows<const T> k = rows<const T>(a.k, b, s.first_key), v = rows<const T>(a.v, b, s.first_key);
    const Rows<T> dk = rows<T>(a.dk, b, s.first_key), dv = rows<T>(a.dv, b, s.first_key);
    const int64_t first_head = kv_head * group, end_head = first_head + group;
    for (int64_t head = first_head; head < end_head; ++head) {
      float* const sums = dq_part(s, head, part);
      for (int64_t i = 0; i < part_size(s); i += kWidth) store(sums + i, Vec{});
    }
    BackwardTile<T> tile(head_dim, a.softmax_scale,
                         tiles.data + thread_index() * BackwardTile<T>::memory_size(head_dim));
    const int64_t begin = part * s.part_keys;
    const int64_t end = begin + s.part_keys < s.keys ? begin + s.part_keys : s.keys;
    for (int64_t j = begin; j < end; j += kBlockKeys) {
      const int32_t* order = k_order.data + s.key_at + j;
      tile.start_keys(rank.data + s.key_at + j,
                      static_cast<int>(end - j < kBlockKeys ? end - j : kBlockKeys));
      bool staged = false;
      for (int64_t i = 0; i < s.rows; i += kBlockQueries) {
        bool some, all;
        tile.visibility(query_block(s, i, 0), &some, &all);
        if (!some) continue;
        if (!staged) tile.stage_keys(k, v, order, kv_head);
        staged = true;
        for (int64_t head = first_head; head < end_head; ++head)
          tile.add(q, dout, query_block(s, i, head), head, all, dq_part(s, head, part) + i * padded_dim);
      }
      for (int r = 0; r < tile.keys; ++r) {
        store_row(dk.at(order[r], kv_head), tile.dk + r * tile.ld, a.softmax_scale);
        store_row(dv.at(order[r], kv_head), tile.dv + r * tile.ld, 1.0f);
      }
    }
    for (int64_t head = first_head; head < end_head && s.parts == 1; ++head)
      store_dq(b, head, dq_part(s, head, part));
  }

  void store_row(T* to, const float* from, float factor) const {
    int d = 0;
    for (; d + kWidth <= head_dim; d += kWidth) store_as(to + d, load(from + d) * splat(factor));
    for (; d < head_dim; ++d) from_float(from[d] * factor, to + d);
  }

  void store_dq(int64_t b, int64_t head, const float* from) const {
    const Sequence& s = sequences.data[b];
    const Rows<T> to = rows<T>(a.dq, b, s.first_row);
    for (int64_t i = 0; i < s.rows; ++i)
      store_row(to.at(q_order.data[s.row_at + i], head), from + i * padded_dim, a.softmax_scale);
  }

  // Adds up the parts of dq of one head.
  void merge(int64_t b, int64_t head) const {
    const Sequence& s = sequences.data[b];
    if (s.parts == 1) return;
    float* first = dq_part(s, head, 0);
    for (int64_t part = 1; part < s.parts; ++part)
      for (int64_t i = 0; i < part_size(s); i += kWidth)
        store(first + i, load(first + i) + load(first + part * part_size(s) + i));
    store_dq(b, head, first);
  }

  void run() const {
    parallel_for(batch, [&](int64_t b) { sort(b); });
    parallel_for(batch * heads, [&](int64_t i) { sum_rows(i / heads, i % heads); });
    parallel_for(total.first_task, [&](int64_t task) {
      int64_t low = 0, high = batch;  // the sequence of the task lies in [low, high)
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (sequences.data[middle].first_task <= task ? low : high) = middle;
      }
      const int64_t at = task - sequences.data[low].first_task;
      differentiate(low, at / sequences.data[low].parts, at % sequences.data[low].parts);
    });
    if (total.dq_at > 0) parallel_for(batch * heads, [&](int64_t i) { merge(i / heads, i % heads); });
  }
};

}  // namespace

void attention_backward(const AttentionBackwardArgs& args) {
  check_args(args);
  if (args.cu_seqlens_q.given()) {
    const int64_t batch = args.cu_seqlens_q.shape[0] - 1;
    check_cu_seqlens(args.cu_seqlens_q.ptr<int32_t>(), batch, args.cu_seqlens_q.stride[0], args.q.shape[0]);
    check_cu_seqlens(args.cu_seqlens_k.ptr<int32_t>(), batch, args.cu_seqlens_k.stride[0], args.k.shape[0]);
  }
  dispatch_dtype(args.q.dtype, [&](auto type) { Backward<decltype(type)>(args).run(); });
}

}  // namespace esokern::cpu::ESOKERN_ISA
