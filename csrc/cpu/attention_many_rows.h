// Attention of a block with many query rows: 16 of them sit in vector lanes.
//
// Work: keys and values are staged 16 rows at a time as float and read by scalar broadcast, so nothing is
// transposed, and
//   softmax is vertical. Where the machine multiplies pairs of bf16 (kBf16Pairs), bf16 storage stays bf16:
//   pairs along head_dim for scores, pairs of keys for values.
// Memory: one staged tile of keys and of values, used by up to four groups of 16 rows; the next tile is
// fetched into the
//   second cache from inside the loops (into the first it would evict this one: rows lie a power of two
//   apart).
#pragma once

#include "cpu/attention_block.h"

namespace esokern::cpu::ESOKERN_ISA {
namespace {

constexpr int kTileKeys = 16;  // keys staged at once
constexpr int kStageStride = kMaxHeadDim + 16;

// One tile of keys as floats; rows past `valid` are zero, so that 0 * (whatever lies there) cannot be NaN.
template <class T>
ESOKERN_INLINE void stage_row(float* to, const T* from, int head_dim) {
  int d = 0;
  for (; d + kWidth <= head_dim; d += kWidth) store(to + d, load(from + d));
  for (; d < head_dim; ++d) to[d] = to_float(from[d]);
}

// Two rows of bf16 as pairs (first, second); `second` may be nullptr, which means zeros.
ESOKERN_INLINE void stage_pair(uint32_t* to, const bf16* first, const bf16* second, int head_dim) {
  int d = 0;
  for (; d + kWidth <= head_dim; d += kWidth) {
    VecU pair = load_bits(first + d);
    if (second != nullptr) pair |= load_bits(second + d) << 16;
    store(to + d, pair);
  }
  for (; d < head_dim; ++d)
    to[d] = first[d].bits | (second != nullptr ? static_cast<uint32_t>(second[d].bits) << 16 : 0);
}

struct alignas(64) Tile {
  union {
    float k[kTileKeys][kStageStride];
    uint32_t k_pair[kTileKeys][kStageStride];  // pairs along head_dim
  };
  union {
    float v[kTileKeys][kStageStride];
    uint32_t v_pair[kTileKeys / 2][kStageStride];  // pairs of keys
  };
  int32_t rank[kTileKeys];
  const char* next_k[kTileKeys];  // rows of the next tile, fetched while this one is used
  const char* next_v[kTileKeys];
  int next_lines;  // cache lines per row, 0 = no next tile
  int32_t rank_min, rank_max;
  int valid;
  bool staged;

  template <class T>
  void look(const Keys<T>& keys, int64_t begin, int64_t end) {
    valid = static_cast<int>(end - begin < kTileKeys ? end - begin : kTileKeys);
    staged = false;
    rank_min = INT32_MAX;
    rank_max = INT32_MIN;
    if (keys.rank == nullptr) {
      for (int j = 0; j < kTileKeys; ++j) rank[j] = static_cast<int32_t>(begin) + j;
      rank_min = rank[0];
      rank_max = rank[valid - 1];
      return;
    }
    for (int j = 0; j < valid; ++j) {
      rank[j] = keys.rank_of(begin + j);
      rank_min = rank[j] < rank_min ? rank[j] : rank_min;
      rank_max = rank[j] > rank_max ? rank[j] : rank_max;
    }
  }
  template <class T>
  void stage(const Keys<T>& keys, int64_t begin, int64_t end, int head_dim, bool pairs) {
    if (staged) return;
    staged = true;
    if constexpr (kIsBf16<T>) {
      if (pairs) stage_pairs(keys, begin, head_dim);
    }
    if (!pairs) stage_rows(keys, begin, head_dim);
    next_lines = begin + kTileKeys < end ? (head_dim * static_cast<int>(sizeof(T)) + 63) / 64 : 0;
    for (int j = 0; j < kTileKeys && next_lines > 0; ++j) {
      const int64_t row = begin + kTileKeys + j < end ? begin + kTileKeys + j : end - 1;
      next_k[j] = reinterpret_cast<const char*>(keys.k_row(row));
      next_v[j] = reinterpret_cast<const char*>(keys.v_row(row));
    }
  }
  template <class T>
  void stage_rows(const Keys<T>& keys, int64_t begin, int head_dim) {
    for (int j = 0; j < valid; ++j) {
      stage_row(k[j], keys.k_row(begin + j), head_dim);
      stage_row(v[j], keys.v_row(begin + j), head_dim);
    }
    for (int j = valid; j < kTileKeys; ++j)
      for (int d = 0; d < head_dim; ++d) k[j][d] = v[j][d] = 0.0f;
  }
  void stage_pairs(const Keys<bf16>& keys, int64_t begin, int head_dim) {
    for (int j = 0; j < kTileKeys; ++j) {
      if (j < valid) {
        const bf16* row = keys.k_row(begin + j);
        int d = 0;
        for (; d + 2 * kWidth <= head_dim; d += 2 * kWidth)
          store(k_pair[j] + d / 2, load(reinterpret_cast<const uint32_t*>(row + d)));
        __builtin_memcpy(k_pair[j] + d / 2, row + d, static_cast<size_t>(head_dim - d) * sizeof(bf16));
      } else {
        for (int d = 0; d < head_dim / 2; ++d) k_pair[j][d] = 0;
      }
    }
    for (int j = 0; j < kTileKeys; j += 2) {
      if (j < valid) {
        const bf16* second = j + 1 < valid ? keys.v_row(begin + j + 1) : nullptr;
        stage_pair(v_pair[j / 2], keys.v_row(begin + j), second, head_dim);
      } else {
        for (int d = 0; d < head_dim; ++d) v_pair[j / 2][d] = 0;
      }
    }
  }
};

// scores[j][lane] = q . k_j for kKeys keys from the first.
template <int kKeys>
ESOKERN_INLINE void score_keys(const float (*q)[kLanes], const float (*k)[kStageStride], int head_dim,
                               float (*scores)[kLanes], const char* const* next, int next_lines) {
  for (int begin = 0; begin < head_dim; begin += kShortSum) {
    const int end = begin + kShortSum < head_dim ? begin + kShortSum : head_dim;
    Vec acc[kKeys][kVecs];
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j)
#pragma GCC unroll 4
      for (int n = 0; n < kVecs; ++n) acc[j][n] = Vec{};
    for (int d = begin; d < end; ++d) {
      Vec query[kVecs];
#pragma GCC unroll 4
      for (int n = 0; n < kVecs; ++n) query[n] = load(&q[d][n * kWidth]);
      if (d < kTileKeys * next_lines) __builtin_prefetch(next[d % kTileKeys] + d / kTileKeys * 64, 0, 2);
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j) {
        const Vec key = splat(k[j][d]);
#pragma GCC unroll 4
        for (int n = 0; n < kVecs; ++n) acc[j][n] = fma(query[n], key, acc[j][n]);
      }
    }
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j)
#pragma GCC unroll 4
      for (int n = 0; n < kVecs; ++n) {
        float* to = &scores[j][n * kWidth];
        store(to, begin > 0 ? load(to) + acc[j][n] : acc[j][n]);
      }
  }
}

// out[d][lane] = out[d][lane] * keep[lane] + sum_j p[j][lane] v_j[d]
ESOKERN_INLINE void add_values(float (*out)[kLanes], const float (*p)[kLanes], const float (*v)[kStageStride],
                               const float* keep, int head_dim, const char* const* next, int next_lines) {
  constexpr int kDims = 8 / (kVecs > 2 ? 2 : 1);
  for (int d = 0; d < head_dim; d += kDims) {
#pragma GCC unroll 4
    for (int n = 0; n < kVecs; ++n) {
      Vec acc[kDims];
      const Vec scale = load(keep + n * kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < kDims; ++i) acc[i] = load(&out[d + i][n * kWidth]) * scale;
#pragma GCC unroll 2
      for (int j = 0; j < kTileKeys; ++j) {
        const Vec weight = load(&p[j][n * kWidth]);
        if (n == 0 && d / kDims < next_lines) __builtin_prefetch(next[j] + d / kDims * 64, 0, 2);
#pragma GCC unroll 8
        for (int i = 0; i < kDims; ++i) acc[i] = fma(weight, splat(v[j][d + i]), acc[i]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kDims; ++i) store(&out[d + i][n * kWidth], acc[i]);
    }
  }
}

// score_keys on pairs along head_dim.
template <bool kRest>
void score_pairs(const uint32_t (*q)[kLanes], const uint32_t (*rest)[kLanes],
                 const uint32_t (*k)[kStageStride], int head_dim, float (*scores)[kLanes],
                 const char* const* next, int next_lines) {
  Vec acc[kTileKeys];
#pragma GCC unroll 16
  for (int j = 0; j < kTileKeys; ++j) acc[j] = Vec{};
  for (int d = 0; d < head_dim / 2; ++d) {
    const VecU query = load(q[d]);
    if (d < kTileKeys * next_lines) __builtin_prefetch(next[d % kTileKeys] + d / kTileKeys * 64, 0, 2);
#pragma GCC unroll 16
    for (int j = 0; j < kTileKeys; ++j) {
      const VecU key = splat(k[j][d]);
      acc[j] = dot_pairs(query, key, acc[j]);
      if constexpr (kRest) acc[j] = dot_pairs(load(rest[d]), key, acc[j]);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kTileKeys; ++j) store(scores[j], acc[j]);
}

// add_values on pairs of keys; the weights are rounded to bf16, as torch does.
ESOKERN_INLINE void add_value_pairs(float (*out)[kLanes], const float (*p)[kLanes],
                                    const uint32_t (*v)[kStageStride], const float* keep, int head_dim,
                                    const char* const* next, int next_lines) {
  constexpr int kDims = 8;
  VecU weights[kTileKeys / 2];
#pragma GCC unroll 8
  for (int j = 0; j < kTileKeys / 2; ++j)
    weights[j] = round_to_bf16(load(p[2 * j])) | round_to_bf16(load(p[2 * j + 1])) << 16;
  const Vec scale = load(keep);
  for (int d = 0; d < head_dim; d += kDims) {
    Vec acc[kDims];
#pragma GCC unroll 8
    for (int i = 0; i < kDims; ++i) acc[i] = load(out[d + i]) * scale;
#pragma GCC unroll 8
    for (int j = 0; j < kTileKeys / 2; ++j) {
      if (d / kDims < next_lines) {
        __builtin_prefetch(next[2 * j] + d / kDims * 64, 0, 2);
        __builtin_prefetch(next[2 * j + 1] + d / kDims * 64, 0, 2);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kDims; ++i) acc[i] = dot_pairs(weights[j], splat(v[j][d + i]), acc[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kDims; ++i) store(out[d + i], acc[i]);
  }
}

// Some lane of the group may see some key of the tile / every lane sees every key.
ESOKERN_INLINE void tile_visibility(const Block& block, int g, const Tile& tile, bool* some, bool* all) {
  *some = *all = tile.rank_max <= block.prefix_min[g];
  if (*all) {
    *all = tile.valid == kTileKeys;
    return;
  }
  int32_t any_bits = 0, all_bits = -1;
  for (int lane = 0; lane < kLanes; ++lane) {
    const QueryRange range = {block.prefix_end[g][lane], block.window_start[g][lane],
                              block.window_end[g][lane]};
    any_bits |= tile_maybe_visible(range, tile.rank_min, tile.rank_max) ? -1 : 0;
    all_bits &= tile_fully_visible(range, tile.rank_min, tile.rank_max) ? -1 : 0;
  }
  *some = any_bits != 0;
  *all = all_bits != 0 && tile.valid == kTileKeys;
}

ESOKERN_INLINE void attend_tile(Block& block, int g, Tile& tile, bool all_visible) {
  alignas(64) float p[kTileKeys][kLanes];
  alignas(64) float keep[kLanes];
  if (kBf16Pairs && block.pairs) {
    const auto score = block.any_rest ? &score_pairs<true> : &score_pairs<false>;
    score(block.q_pair[g], block.q_rest[g], tile.k_pair, block.head_dim, p, tile.next_k, tile.next_lines);
  } else {
    constexpr int kKeys = 16 / kVecs;  // accumulators that fit the registers
    for (int j = 0; j < kTileKeys; j += kKeys)
      score_keys<kKeys>(block.q[g], tile.k + j, block.head_dim, p + j, tile.next_k,
                        j == 0 ? tile.next_lines : 0);
  }
#pragma GCC unroll 4
  for (int n = 0; n < kVecs; ++n) {
    const int at = n * kWidth;
    const VecI prefix_end = load(&block.prefix_end[g][at]);
    const VecI start = load(&block.window_start[g][at]), end = load(&block.window_end[g][at]);
    const Vec old_max = load(&block.row_max[g][at]);
    Vec new_max = old_max;
    for (int j = 0; j < kTileKeys; ++j) {
      Vec score = load(&p[j][at]) * splat(block.scale);
      if (!all_visible) {
        const VecI rank = splat(tile.rank[j]);
        VecI seen = (rank <= prefix_end) | ((start <= rank) & (rank <= end));
        if (j >= tile.valid) seen = VecI{};
        score = select(seen, score, splat(kNegInf));
      }
      store(&p[j][at], score);
      new_max = max(score, new_max);
    }
    const Vec shift = select(new_max == splat(kNegInf), splat(0.0f), new_max);  // no -inf - -inf
    const Vec scale = exp2(old_max - shift);
    Vec sum = load(&block.row_sum[g][at]) * scale;
    for (int j = 0; j < kTileKeys; ++j) {
      const Vec weight = exp2(load(&p[j][at]) - shift);
      sum = sum + weight;
      store(&p[j][at], weight);
    }
    store(&block.row_max[g][at], new_max);
    store(&block.row_sum[g][at], sum);
    store(keep + at, scale);
  }
  if (kBf16Pairs && block.pairs)
    add_value_pairs(block.out[g], p, tile.v_pair, keep, block.head_dim, tile.next_v, tile.next_lines);
  else
    add_values(block.out[g], p, tile.v, keep, block.head_dim, tile.next_v, tile.next_lines);
}

template <class T>
void attend_many(Block& block, const Keys<T>& keys, int64_t begin, int64_t end) {
  Tile tile;
  const int groups = (block.lanes + kLanes - 1) / kLanes;
  for (int64_t j = begin; j < end; j += kTileKeys) {
    tile.look(keys, j, end);
    for (int g = 0; g < groups; ++g) {
      bool some, all;
      tile_visibility(block, g, tile, &some, &all);
      if (!some) continue;
      tile.stage(keys, j, end, block.head_dim, block.pairs);
      attend_tile(block, g, tile, all);
      tile.next_lines = 0;  // fetched
    }
  }
}

}  // namespace
}  // namespace esokern::cpu::ESOKERN_ISA
