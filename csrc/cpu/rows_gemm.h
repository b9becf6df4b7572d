// out[row, n] = sum over d of x[row, d] * w[n, d]: up to 16 rows against rows of a weight that streams by
// once. Lanes run along d and one accumulator belongs to one (row, n), so every result has the same order of
// additions whatever the other rows, their number and the place of n in a tile are. Nothing is packed or
// padded. Tile: 16 (other instruction sets: 8) accumulators as 4 x 4, 2 x 8 or 1 x 16 (rows x n), reduced
// together by a butterfly. A strip of 16 weight rows is read from memory by the first tile that needs it
// while the next strip is prefetched evenly over all tiles; x and the strip stay in the caches.
#pragma once

#include "cpu/simd.h"

namespace esokern::cpu::ESOKERN_ISA {
namespace {

constexpr int kGemmRows = 16;
constexpr int kGemmStrip = 16;  // weight rows
constexpr int kGemmAccumulators = kWidth == 16 ? 16 : 8;

// Per step, kAhead steps' worth of the coming strip are prefetched.
template <class T, int kRows, int kAhead>
ESOKERN_INLINE void gemm_tile(const T* const* x, const T* const* w, int64_t depth, float* out, int64_t ld_out,
                              const T** ahead) {
  constexpr int kCols = kGemmAccumulators / kRows;
  using D = Dot<T>;
  Vec acc[kGemmAccumulators];
#pragma GCC unroll 16
  for (int i = 0; i < kGemmAccumulators; ++i) acc[i] = Vec{};
  const T* next = *ahead;
  int64_t d = 0;
  for (; d + D::kStep <= depth; d += D::kStep) {
    typename D::Operand row[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) row[r] = D::load(x[r] + d);
#pragma GCC unroll 16
    for (int c = 0; c < kCols; ++c) {
      const typename D::Operand column = D::load(w[c] + d);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
        acc[r * kCols + c] = D::multiply_add(row[r], column, acc[r * kCols + c]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kAhead; ++i) prefetch(next + i * D::kStep);
    next += kAhead * D::kStep;
  }
  *ahead = next;
  if (d < depth) {
    const int rest = static_cast<int>(depth - d);
    typename D::Operand row[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) row[r] = D::load_partial(x[r] + d, rest);
#pragma GCC unroll 16
    for (int c = 0; c < kCols; ++c) {
      const typename D::Operand column = D::load_partial(w[c] + d, rest);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
        acc[r * kCols + c] = D::multiply_add(row[r], column, acc[r * kCols + c]);
    }
  }
  float sums[kGemmAccumulators];
#pragma GCC unroll 4
  for (int i = 0; i < kGemmAccumulators; i += kWidth) store(sums + i, reduce_add_each(acc + i));
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) std::memcpy(out + r * ld_out, sums + r * kCols, kCols * sizeof(float));
}

// Columns [begin, end) of a strip for kRows rows; w: the strip's row pointers.
template <class T, int kRows, int kAhead>
inline __attribute__((noinline)) void gemm_tiles(const T* const* x, const T* const* w, int64_t depth,
                                                 float* out, int64_t ld_out, const T** ahead, int begin,
                                                 int end) {
  for (int c = begin; c < end; c += kGemmAccumulators / kRows)
    gemm_tile<T, kRows, kAhead>(x, w + c, depth, out + c, ld_out, ahead);
}

// out[r * ld_out + i] = x[r] . w[n_begin + i] for r < rows <= 16 and i < n_end - n_begin, which is rounded up
// to whole strips: out needs room for that, what is behind n_end repeats the last column.
template <class T>
inline void rows_gemm(const T* const* x, int rows, const T* w, int64_t ld_w, int64_t n_begin, int64_t n_end,
                      int64_t depth, float* out, int64_t ld_out) {
  constexpr int kCols = kGemmAccumulators / 4;
  constexpr int kSteps = kCols;  // what a 4-row tile prefetches per step if no other tile shares the strip
  const int groups = rows / 4;
  for (int64_t n = n_begin; n < n_end; n += kGemmStrip) {
    const T* strip[kGemmStrip];
    for (int i = 0; i < kGemmStrip; ++i) strip[i] = w + (n + i < n_end ? n + i : n_end - 1) * ld_w;
    // Prefetching beyond the weight is harmless; a weight with gaps between its rows is left to the hardware.
    const T* ahead = w + (n + kGemmStrip) * ld_w;
    float* strip_out = out + (n - n_begin);
    int r = 0;
    if (groups > 0) {
      for (int c = 0; c < kGemmStrip; c += kCols) {  // the columns of a tile stay in L1 for all groups
        for (int g = 0; g < groups; ++g) {
          if (groups == 1)
            gemm_tiles<T, 4, kSteps>(x, strip, depth, strip_out, ld_out, &ahead, c, c + kCols);
          else if (groups < 4)
            gemm_tiles<T, 4, (kSteps + 1) / 2>(x + 4 * g, strip, depth, strip_out + 4 * g * ld_out, ld_out,
                                               &ahead, c, c + kCols);
          else
            gemm_tiles<T, 4, (kSteps + 3) / 4>(x + 4 * g, strip, depth, strip_out + 4 * g * ld_out, ld_out,
                                               &ahead, c, c + kCols);
        }
      }
      r = 4 * groups;
    }
    if (rows - r >= 2) {
      if (r == 0)
        gemm_tiles<T, 2, kGemmAccumulators / 2>(x, strip, depth, strip_out, ld_out, &ahead, 0, kGemmStrip);
      else
        gemm_tiles<T, 2, 0>(x + r, strip, depth, strip_out + r * ld_out, ld_out, &ahead, 0, kGemmStrip);
      r += 2;
    }
    if (rows - r >= 1) {
      if (r == 0)
        gemm_tiles<T, 1, kGemmAccumulators>(x, strip, depth, strip_out, ld_out, &ahead, 0, kGemmStrip);
      else
        gemm_tiles<T, 1, 0>(x + r, strip, depth, strip_out + r * ld_out, ld_out, &ahead, 0, kGemmStrip);
    }
  }
}

}  // namespace
}  // namespace esokern::cpu::ESOKERN_ISA
