// One tile of the backward pass of attention: up to 64 query rows of one head against up to 64 keys.
//
//   p = exp(scale q k^T - lse),  ds = p (dout v^T - delta),  dv += p^T dout,  dk += ds^T q,  dq += ds k
//
// Work: five products of 64 x 64 x head_dim, one exp per query and key. A tile that is partly hidden is done in strips of
//   16 rows, each over the 16s of keys from the first that it sees to the last.
// Memory: keys are staged, and K and V transposed, once per block of 64 keys; queries once per tile. p and ds never
//   exist for more than a tile. Everything together is about 2 KiB * (head_dim + 30), with pairs 2.5 KiB * (head_dim +
//   50), in the second cache.
// Storage of bf16 stays pairs of bf16 where the machine multiplies them (kBf16Pairs): p and ds are rounded to bf16, as
// torch does.
#pragma once

#include "cpu/attention_many_rows.h"
#include "cpu/block_gemm.h"

namespace esokern::cpu::ESOKERN_ISA {
namespace {

constexpr int kBlockQueries = 64, kBlockKeys = 64;
constexpr int kKeyStride = kBlockKeys + 16;  // no power of two: rows lie in different sets of a cache

ESOKERN_INLINE int64_t round_up(int64_t x, int64_t unit) {
  return (x + unit - 1) / unit * unit;
}

// The rows of one sequence in a tensor, by row and head.
template <class T>
struct Rows {
  T* data;
  int64_t row_stride, head_stride;
  T* at(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }
};

// 64 query rows of one head, `rows` of them real; the arrays go on to 64 with rows of zeros.
struct QueryBlock {
  const int32_t *order, *prefix_end, *window_start, *window_end;
  const float *lse, *delta;
  int rows;
};

template <bool kPairs>
struct ElementOf {
  using Type = float;
};
template <>
struct ElementOf<true> {
  using Type = uint32_t;
};

template <class T>
struct BackwardTile {
  static constexpr bool kPairs = kBf16Pairs && kIsBf16<T>;
  static constexpr int kPerElement = kPairs ? 2 : 1;
  using E = typename ElementOf<kPairs>::Type;

  const int head_dim, padded_dim, ld;
  const float scale;
  E *k_cols, *v_cols;       // [head_dim][kKeyStride], pairs along head_dim
  E* k_rows;                // [keys][ld], pairs of keys
  E *q_rows, *dout_rows;    // [rows][ld], pairs along head_dim
  E *q_depth, *dout_depth;  // [rows][ld], pairs of rows
  float *p, *ds;            // [rows][kKeyStride]
  E *p_depth, *ds_depth;    // [rows][kKeyStride], pairs of rows
  E* ds_rows;               // [rows][kKeyStride], pairs of keys
  float *dk, *dv;           // [keys][ld]
  const int32_t* rank;      // [64]
  int32_t live[kBlockKeys];
  int keys, key_cols;  // keys of the block; the same rounded up to whole vectors

  // Floats that a tile works in.
  static int64_t memory_size(int64_t head_dim) {
    const int64_t padded = round_up(head_dim, 16);
    return 2 * padded * kKeyStride + (kPairs ? 7 : 5) * 64 * (padded + 16) +
           (kPairs ? 5 : 2) * 64 * kKeyStride + 16;
  }

  BackwardTile(int head_dim, float softmax_scale, float* memory)
      : head_dim(head_dim),
        padded_dim(static_cast<int>(round_up(head_dim, 16))),
        ld(padded_dim + 16),
        scale(softmax_scale) {
    float* next = memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64 / sizeof(float);
    const auto take = [&](auto** place, int64_t rows, int64_t row_size) {
      *place = reinterpret_cast<decltype(*place + 0)>(next);
      next += rows * row_size;
    };
    take(&k_cols, padded_dim, kKeyStride);
    take(&v_cols, padded_dim, kKeyStride);
    take(&k_rows, kBlockKeys, ld);
    take(&q_rows, kBlockQueries, ld);
    take(&dout_rows, kBlockQueries, ld);
    take(&dk, kBlockKeys, ld);
    take(&dv, kBlockKeys, ld);
    take(&p, kBlockQueries, kKeyStride);
    take(&ds, kBlockQueries, kKeyStride);
    if constexpr (kPairs) {
      take(&q_depth, kBlockQueries, ld);
      take(&dout_depth, kBlockQueries, ld);
      take(&p_depth, kBlockQueries, kKeyStride);
      take(&ds_depth, kBlockQueries, kKeyStride);
      take(&ds_rows, kBlockQueries, kKeyStride);
    } else {
      q_depth = q_rows, dout_depth = dout_rows, p_depth = p, ds_depth = ds_rows = ds;
    }
  }

  // The next block: `count` keys with these ranks. They are staged when the first tile needs them. What lies in columns
  // past head_dim is never used.
  void start_keys(const int32_t* ranks, int count) {
    rank = ranks;
    keys = count;
    key_cols = static_cast<int>(round_up(count, 16));
    for (int j = 0; j < kBlockKeys; ++j) live[j] = j < count ? -1 : 0;
    for (int i = 0; i < key_cols * ld; ++i) dk[i] = dv[i] = 0.0f;
  }

  // Does any row of the block see any key / every row every key?
  void visibility(const QueryBlock& block, bool* some, bool* all) const {
    int32_t rank_min = rank[0], rank_max = rank[keys - 1];  // sorted
    bool every = keys == kBlockKeys, any_row = false;
    for (int i = 0; i < block.rows; ++i) {
      const QueryRange range = {block.prefix_end[i], block.window_start[i], block.window_end[i]};
      every = every && tile_fully_visible(range, rank_min, rank_max);
      any_row = any_row || tile_maybe_visible(range, rank_min, rank_max);
    }
    *all = every;
    *some = every;
    for (int i = 0; i < block.rows && any_row && !*some; ++i)
      for (int j = 0; j < key_cols; j += kWidth) *some = *some || any(seen(block, i, j));
  }

  void stage_keys(const Rows<const T>& k, const Rows<const T>& v, const int32_t* order, int64_t kv_head) {
    stage_columns(k_cols, k, order, kv_head);
    stage_columns(v_cols, v, order, kv_head);
    stage_depth(k_rows, k, order, keys, key_cols, kv_head);
  }

  // dq: [rows, rounded up to 8][padded_dim], added to.
  void add(const Rows<const T>& q, const Rows<const T>& dout, const QueryBlock& block, int64_t head,
           bool all_visible, float* dq) {
    const int rows = static_cast<int>(round_up(block.rows, 8));
    stage_queries(q_rows, q_depth, q, block, rows, head);
    stage_queries(dout_rows, dout_depth, dout, block, rows, head);
    if (all_visible) return add_strip<true>(block, 0, rows, 0, key_cols, dq);
    for (int row = 0; row < rows; row += kStrip) {
      const int end = row + kStrip < rows ? row + kStrip : rows;
      int first = key_cols, last = 0;
      for (int i = row; i < end && i < block.rows; ++i)
        for (int j = 0; j < key_cols; j += kWidth) {
          if ((j >= first && j < last) || !any(seen(block, i, j))) continue;
          first = j < first ? j / kStrip * kStrip : first;
          last = j >= last ? (j / kStrip + 1) * kStrip : last;
        }
      if (first < last) add_strip<false>(block, row, end, first, last, dq);
    }
  }

 private:
  static constexpr int kStrip = 16;

  // Rows and keys [row, row_end) x [key, key_end), multiples of 8 and 16.
  template <bool kAllVisible>
  void add_strip(const QueryBlock& block, int row, int row_end, int key, int key_end, float* dq) {
    const int rows = row_end - row, cols = key_end - key, at = row * kKeyStride + key;
    const int depth_row = row / kPerElement, depth = rows / kPerElement;
    multiply(q_rows + row * ld, k_cols + key, p + at, rows, cols);
    multiply(dout_rows + row * ld, v_cols + key, ds + at, rows, cols);
    for (int i = row; i < row_end; i += kPerElement) weigh<kAllVisible>(block, i, key, key_end);
    block_gemm<false>(p_depth + depth_row * kKeyStride + key, kKeyStride, dout_depth + depth_row * ld, ld,
                      depth, dv + key * ld, ld, cols, padded_dim, true);
    block_gemm<false>(ds_depth + depth_row * kKeyStride + key, kKeyStride, q_depth + depth_row * ld, ld,
                      depth, dk + key * ld, ld, cols, padded_dim, true);
    block_gemm<true>(ds_rows + row * kKeyStride + key / kPerElement, kKeyStride,
                     k_rows + key / kPerElement * ld, ld, cols / kPerElement, dq + row * padded_dim,
                     padded_dim, rows, padded_dim, true);
  }

  // to = left right over head_dim, in short sums as in the forward.
  void multiply(const E* left, const E* right, float* to, int rows, int cols) {
    const int depth = head_dim / kPerElement;
    for (int d = 0; d < depth; d += kShortSum)
      block_gemm<true>(left + d, ld, right + d * kKeyStride, kKeyStride,
                       depth - d < kShortSum ? depth - d : kShortSum, to, kKeyStride, rows, cols, d > 0);
  }

  // Which of kWidth keys from j does row i see?
  VecI seen(const QueryBlock& block, int i, int j) const {
    const VecI ranks = load(rank + j);
    const VecI in_window = (splat(block.window_start[i]) <= ranks) & (ranks <= splat(block.window_end[i]));
    return ((ranks <= splat(block.prefix_end[i])) | in_window) & load(live + j);
  }

  // Keys transposed, 16 at a time: a whole cache line of every column.
  void stage_columns(E* to, const Rows<const T>& from, const int32_t* order, int64_t kv_head) {
    const T zeros[kMaxHeadDim] = {};
    for (int j = 0; j < key_cols; j += kStrip) {
      const T* row[kStrip];
      for (int r = 0; r < kStrip; ++r) row[r] = j + r < keys ? from.at(order[j + r], kv_head) : zeros;
      for (int d = 0; d < head_dim / kPerElement; ++d)
        for (int r = 0; r < kStrip; ++r) {
          E* at = to + d * kKeyStride + j + r;
          if constexpr (kPairs)
            __builtin_memcpy(at, row[r] + 2 * d, sizeof *at);
          else
            *at = to_float(row[r][d]);
        }
    }
  }

  // Rows as the right factor of a product that sums over them: up to `padded`, which is even, with zeros.
  void stage_depth(E* to, const Rows<const T>& from, const int32_t* order, int count, int padded,
                   int64_t head) {
    for (int i = 0; i < padded; i += kPerElement) {
      E* row = to + i / kPerElement * ld;
      if (i >= count) {
        for (int d = 0; d < head_dim; ++d) row[d] = E{};
      } else if constexpr (kPairs) {
        const T* second = i + 1 < count ? from.at(order[i + 1], head) : nullptr;
        stage_pair(row, from.at(order[i], head), second, head_dim);
      } else {
        stage_row(row, from.at(order[i], head), head_dim);
      }
    }
  }

  void stage_queries(E* rows, E* depth, const Rows<const T>& from, const QueryBlock& block, int padded,
                     int64_t head) {
    stage_depth(depth, from, block.order, block.rows, padded, head);
    if constexpr (kPairs) {
      const size_t bytes = static_cast<size_t>(head_dim) * sizeof(T);
      for (int i = 0; i < padded; ++i) {
        if (i < block.rows)
          __builtin_memcpy(rows + i * ld, from.at(block.order[i], head), bytes);
        else
          __builtin_memset(rows + i * ld, 0, bytes);
      }
    }
  }

  // Row i, and with pairs i + 1, of p and ds, keys [key, key_end): from products to weights.
  template <bool kAllVisible>
  void weigh(const QueryBlock& block, int i, int key, int key_end) {
    for (int j = key; j < key_end; j += kWidth) {
      Vec weight[kPerElement], gradient[kPerElement];
#pragma GCC unroll 2
      for (int r = 0; r < kPerElement; ++r) {
        const int row = i + r, at = row * kKeyStride + j;
        weight[r] = exp(fma(load(p + at), splat(scale), splat(-block.lse[row])));
        gradient[r] = weight[r] * (load(ds + at) - splat(block.delta[row]));
        if constexpr (!kAllVisible) {
          const VecI mask = seen(block, row, j);
          weight[r] = select(mask, weight[r], Vec{});
          gradient[r] = select(mask, gradient[r], Vec{});
        }
        if constexpr (!kPairs) {
          store(p + at, weight[r]);
          store(ds + at, gradient[r]);
        }
      }
      if constexpr (kPairs) {
        const int at = i / 2 * kKeyStride + j;
        const VecU first = round_to_bf16(gradient[0]), second = round_to_bf16(gradient[1]);
        store(p_depth + at, round_to_bf16(weight[0]) | round_to_bf16(weight[1]) << 16);
        store(ds_depth + at, first | second << 16);
        store_bits(reinterpret_cast<bf16*>(ds_rows + i * kKeyStride) + j, first);
        store_bits(reinterpret_cast<bf16*>(ds_rows + (i + 1) * kKeyStride) + j, second);
      }
    }
  }
};

}  // namespace
}  // namespace esokern::cpu::ESOKERN_ISA
