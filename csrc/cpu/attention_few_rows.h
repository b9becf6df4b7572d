// Attention of a block with few query rows: vectors run along head_dim.
//
// Work: for each tile of 64 keys the scores of all rows, two at a time, their running softmax, then the values;
// bound by memory. Memory: keys and values are read in place; nothing is staged. While scores are computed the
// tile's values are fetched, while values are added the next tile's keys: fetching never pauses.
#pragma once

#include "cpu/attention_block.h"

namespace esokern::cpu::ESOKERN_ISA {
namespace {

constexpr int kFewLanes = 6;  // up to here vectors along head_dim win
constexpr int kFewTileKeys = 64;

// Into the second cache: rows lie far apart and would evict each other from the few sets of the first.
template <class T>
ESOKERN_INLINE void fetch(const T* from, int count) {
  const char* bytes = reinterpret_cast<const char*>(from);
  for (int64_t byte = 0; byte < count * static_cast<int64_t>(sizeof(T)); byte += 64)
    __builtin_prefetch(bytes + byte, 0, 2);
}

// scores[r][j .. j + kWidth) = q_r . k_j for kRows queries, kWidth / kRows keys at a time: a key is loaded once for all.
template <int kRows, class T>
ESOKERN_INLINE void score_few(const float (*q)[kMaxHeadDim], const T* const* rows,
                              const float (*tails)[kWidth], int whole, bool tail, float scale,
                              float (*scores)[kFewTileKeys], int at) {
  constexpr int kKeys = kWidth / kRows;
  for (int part = 0; part < kRows; ++part) {
    const T* const* key = rows + part * kKeys;
    Vec sums[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) sums[i] = Vec{};
    for (int d = 0; d < whole; d += kWidth) {
      Vec query[kRows];
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) query[r] = load(q[r] + d);
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j) {
        const Vec value = load(key[j] + d);
#pragma GCC unroll 2
        for (int r = 0; r < kRows; ++r) sums[r * kKeys + j] = fma(query[r], value, sums[r * kKeys + j]);
      }
    }
    if (tail)
      for (int j = 0; j < kKeys; ++j)
        for (int r = 0; r < kRows; ++r)
          sums[r * kKeys + j] = fma(load(q[r] + whole), load(tails[part * kKeys + j]), sums[r * kKeys + j]);
    alignas(64) float dots[kWidth];
    store(dots, reduce_add_each(sums) * splat(scale));
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r)
      __builtin_memcpy(scores[r] + at + part * kKeys, dots + r * kKeys, kKeys * sizeof(float));
  }
}

// out[r][d ..] += sum_j scores[r][j] v_j[d ..] for kRows rows and kColumns vectors of columns, which stay in
// registers; on the way the same columns of the next tile's keys are fetched.
template <int kRows, int kColumns, class T>
ESOKERN_INLINE void add_values_few(float (*out)[kMaxHeadDim + kWidth], const float (*scores)[kFewTileKeys],
                                   const Keys<T>& keys, int64_t begin, int valid, int d, int64_t fetch_end) {
  Vec acc[kRows][kColumns];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) acc[r][c] = load(out[r] + d + c * kWidth);
  for (int j = 0; j < valid; ++j) {
    const T* row = keys.v_row(begin + j) + d;
    const int64_t next = begin + kFewTileKeys + j;
    if (next < fetch_end) fetch(keys.k_row(next) + d, kColumns * kWidth);
    Vec value[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) value[c] = load(row + c * kWidth);
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = splat(scores[r][j]);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) acc[r][c] = fma(weight, value[c], acc[r][c]);
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) store(out[r] + d + c * kWidth, acc[r][c]);
}

template <int kColumns, class T>
void add_values_few(float (*out)[kMaxHeadDim + kWidth], const float (*scores)[kFewTileKeys],
                    const Keys<T>& keys, int64_t begin, int valid, int d, int64_t fetch_end, int lanes) {
  int r = 0;
  for (; r + 1 < lanes; r += 2)
    add_values_few<2, kColumns>(out + r, scores + r, keys, begin, valid, d, r == 0 ? fetch_end : 0);
  if (r < lanes)
    add_values_few<1, kColumns>(out + r, scores + r, keys, begin, valid, d, r == 0 ? fetch_end : 0);
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
  alignas(64) float tail_row[kWidth] = {};
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
        fetch(keys.v_row(row), head_dim);
        for (int d = whole; d < head_dim; ++d) tails[i][d - whole] = to_float(rows[i][d]);
      }
      int r = 0;
      for (; r + 1 < lanes; r += 2) score_few<2>(q + r, rows, tails, whole, tail, block.scale, scores + r, j);
      if (r < lanes) score_few<1>(q + r, rows, tails, whole, tail, block.scale, scores + r, j);
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
    for (int d = 0; d < whole;) {
      const int columns = whole - d >= 4 * kWidth ? 4 : whole - d >= 2 * kWidth ? 2 : 1;
      const auto add = columns == 4   ? &add_values_few<4, T>
                       : columns == 2 ? &add_values_few<2, T>
                                      : &add_values_few<1, T>;
      add(out, scores, keys, j0, valid, d, end, lanes);
      d += columns * kWidth;
    }
    for (int j = 0; tail && j < valid; ++j) {
      const T* row = keys.v_row(j0 + j);
      for (int d = whole; d < head_dim; ++d) tail_row[d - whole] = to_float(row[d]);
      for (int r = 0; r < lanes; ++r)
        store(out[r] + whole, fma(splat(scores[r][j]), load(tail_row), load(out[r] + whole)));
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
