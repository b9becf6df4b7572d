// Attention of a block with few query rows: vectors run along head_dim.
//
// Work: for each tile of 64 keys the scores of all rows, their running softmax, then the values; bound by
// memory. Memory: keys and values are read in place, once for all rows, fetched ahead; nothing is staged.
#pragma once

#include "cpu/attention_block.h"

namespace esokern::cpu::ESOKERN_ISA {
namespace {

constexpr int kFewLanes = 6;  // up to here vectors along head_dim win
constexpr int kFewTileKeys = 64;
constexpr int kFetchAhead = 16;  // keys

template <class T>
ESOKERN_INLINE void fetch_row(const T* row, int head_dim) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t byte = 0; byte < head_dim * static_cast<int64_t>(sizeof(T)); byte += 64)
    __builtin_prefetch(bytes + byte);
}

// out[r][d ..] += sum_j scores[r][j] v_j[d ..] over four vectors of columns, kRows rows at once.
template <int kRows, class T>
ESOKERN_INLINE void add_values_few(float (*out)[kMaxHeadDim + kWidth], const float (*scores)[kFewTileKeys],
                                   const Keys<T>& keys, int64_t begin, int valid, int d) {
  Vec acc[kRows][4];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) acc[r][c] = load(out[r] + d + c * kWidth);
  for (int j = 0; j < valid; ++j) {
    const T* row = keys.v_row(begin + j) + d;
    Vec value[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) value[c] = load(row + c * kWidth);
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = splat(scores[r][j]);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) acc[r][c] = fma(weight, value[c], acc[r][c]);
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) store(out[r] + d + c * kWidth, acc[r][c]);
}

// The states of `lanes` rows are kept as plain rows here and put into the block at the end.
template <class T>
void attend_few(Block& block, const Keys<T>& keys, int64_t begin, int64_t end) {
  alignas(64) float q[kFewLanes][kMaxHeadDim];
  alignas(64) float out[kFewLanes][kMaxHeadDim + kWidth];
  alignas(64) float scores[kFewLanes][kFewTileKeys];
  float row_max[kFewLanes], row_sum[kFewLanes];
  const int head_dim = block.head_dim, lanes = block.lanes;
  const int padded = (head_dim + kWidth - 1) / kWidth * kWidth;
  for (int r = 0; r < lanes; ++r) {
    for (int d = 0; d < padded; ++d) q[r][d] = d < head_dim ? block.q[0][d][r] : 0.0f;
    for (int d = 0; d < padded; ++d) out[r][d] = 0.0f;
    row_max[r] = kNegInf;
    row_sum[r] = 0.0f;
  }
  const bool tail = padded != head_dim;
  const int whole = tail ? padded - kWidth : padded;
  alignas(64) float tails[kWidth][kWidth] = {};
  alignas(64) float tail_row[kMaxHeadDim + kWidth] = {};
  for (int64_t j0 = begin; j0 < end; j0 += kFewTileKeys) {
    const int valid = static_cast<int>(end - j0 < kFewTileKeys ? end - j0 : kFewTileKeys);
    int32_t rank_min = INT32_MAX, rank_max = INT32_MIN;
    for (int j = 0; j < valid; ++j) {
      const int32_t rank = keys.rank_of(j0 + j);
      rank_min = rank < rank_min ? rank : rank_min;
      rank_max = rank > rank_max ? rank : rank_max;
    }
    bool some = false, all = true;
    for (int r = 0; r < lanes; ++r) {
      some |= tile_maybe_visible(block.range(r), rank_min, rank_max);
      all &= tile_fully_visible(block.range(r), rank_min, rank_max);
    }
    if (!some) continue;
    for (int j = 0; j < valid; j += kWidth) {
      const T* rows[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const int64_t row = j0 + (j + i < valid ? j + i : valid - 1);
        rows[i] = keys.k_row(row);
        fetch_row(keys.v_row(row), head_dim);
        if (row + kFetchAhead < end) fetch_row(keys.k_row(row + kFetchAhead), head_dim);
        for (int d = whole; d < head_dim; ++d) tails[i][d - whole] = to_float(rows[i][d]);
      }
      for (int r = 0; r < lanes; ++r) {
        Vec sums[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) sums[i] = Vec{};
        for (int d = 0; d < whole; d += kWidth) {
          const Vec query = load(q[r] + d);
#pragma GCC unroll 16
          for (int i = 0; i < kWidth; ++i) sums[i] = fma(query, load(rows[i] + d), sums[i]);
        }
        if (tail)
          for (int i = 0; i < kWidth; ++i) sums[i] = fma(load(q[r] + whole), load(tails[i]), sums[i]);
        store(scores[r] + j, reduce_add_each(sums) * splat(block.scale));
      }
    }
    for (int r = 0; r < lanes; ++r) {
      for (int j = valid; j < kFewTileKeys; ++j) scores[r][j] = kNegInf;
      if (!all)
        for (int j = 0; j < valid; ++j)
          if (!visible(block.range(r), keys.rank_of(j0 + j))) scores[r][j] = kNegInf;
      Vec tile_max = splat(kNegInf);
      for (int j = 0; j < kFewTileKeys; j += kWidth) tile_max = max(load(scores[r] + j), tile_max);
      const float best = reduce_max(tile_max);
      const float new_max = best > row_max[r] ? best : row_max[r];
      const float shift = new_max == kNegInf ? 0.0f : new_max;
      alignas(64) float keep[kWidth];
      store(keep, exp2(splat(row_max[r] - shift)));
      Vec sum = Vec{};
      for (int j = 0; j < kFewTileKeys; j += kWidth) {
        const Vec weight = exp2(load(scores[r] + j) - splat(shift));
        sum = sum + weight;
        store(scores[r] + j, weight);
      }
      row_sum[r] = row_sum[r] * keep[0] + reduce_add(sum);
      row_max[r] = new_max;
      for (int d = 0; d < padded; d += kWidth) store(out[r] + d, load(out[r] + d) * splat(keep[0]));
    }
    // Vectors of four columns at a time stay in registers over the tile's values.
    for (int d = 0; d < padded; d += 4 * kWidth) {
      const int columns = padded - d < 4 * kWidth ? (padded - d) / kWidth : 4;
      for (int r = 0; r < lanes; ++r) {
        const bool whole_columns = columns == 4 && !(tail && d + 4 * kWidth == padded);
        if (whole_columns && r + 1 < lanes) {
          add_values_few<2>(out + r, scores + r, keys, j0, valid, d);
          ++r;
        } else if (whole_columns) {
          add_values_few<1>(out + r, scores + r, keys, j0, valid, d);
        } else {
          for (int j = 0; j < valid; ++j) {
            const T* row = keys.v_row(j0 + j);
            const Vec weight = splat(scores[r][j]);
            for (int c = 0; c < columns; ++c) {
              const int at = d + c * kWidth;
              if (at + kWidth > head_dim)
                for (int i = at; i < head_dim; ++i) tail_row[i] = to_float(row[i]);
              const Vec value = at + kWidth > head_dim ? load(tail_row + at) : load(row + at);
              store(out[r] + at, fma(weight, value, load(out[r] + at)));
            }
          }
        }
      }
    }
  }
  for (int r = 0; r < lanes; ++r) {
    for (int d = 0; d < head_dim; ++d) block.out[0][d][r] = out[r][d];
    block.row_max[0][r] = row_max[r];
    block.row_sum[0][r] = row_sum[r];
  }
}

}  // namespace
}  // namespace esokern::cpu::ESOKERN_ISA
