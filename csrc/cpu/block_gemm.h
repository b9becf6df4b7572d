// C[m][n] = or += sum_k A[m][k] B[k][n] on blocks that lie in the caches: scalars of A are broadcast, vectors of B run
// along n, sums stay in registers over the whole depth.
//
// Elements are floats, or, where the machine multiplies them (kBf16Pairs), pairs of bf16 in 32 bits: then k counts
// pairs. A lies by rows (kByRows) or by columns: element (m, k) at a[m * ld_a + k] or a[k * ld_a + m].
// Work: rows * cols * depth multiply-adds; registers hold 8 x 2 vectors of C (4 x 2 where there are 16 registers).
// Limits: rows a multiple of 8, cols a multiple of kWidth. The products of an element are summed in the order of k, whatever the
// sizes are, and then added to C: long sums are sums of short ones.
#pragma once

#include "cpu/simd.h"

namespace esokern::cpu::ESOKERN_ISA {
namespace {

ESOKERN_INLINE Vec multiply_add(float a, Vec b, Vec acc) {
  return fma(splat(a), b, acc);
}
ESOKERN_INLINE Vec multiply_add(uint32_t a, VecU b, Vec acc) {
  return dot_pairs(splat(a), b, acc);
}

constexpr int kGemmBlockRows = kWidth == 16 ? 8 : 4;

template <bool kByRows, int kVecCount, class E>
ESOKERN_INLINE void block_gemm_tile(const E* a, int64_t ld_a, const E* b, int64_t ld_b, int depth, float* c,
                                    int64_t ld_c, bool add) {
  using Operand = decltype(load(b));
  Vec acc[kGemmBlockRows][kVecCount];
#pragma GCC unroll 8
  for (int m = 0; m < kGemmBlockRows; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < kVecCount; ++n) acc[m][n] = Vec{};
  for (int k = 0; k < depth; ++k) {
    Operand column[kVecCount];
#pragma GCC unroll 2
    for (int n = 0; n < kVecCount; ++n) column[n] = load(b + k * ld_b + n * kWidth);
#pragma GCC unroll 8
    for (int m = 0; m < kGemmBlockRows; ++m) {
      const E scalar = kByRows ? a[m * ld_a + k] : a[k * ld_a + m];
#pragma GCC unroll 2
      for (int n = 0; n < kVecCount; ++n) acc[m][n] = multiply_add(scalar, column[n], acc[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kGemmBlockRows; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < kVecCount; ++n) {
      float* to = c + m * ld_c + n * kWidth;
      store(to, add ? load(to) + acc[m][n] : acc[m][n]);
    }
}

template <bool kByRows, class E>
inline __attribute__((noinline)) void block_gemm(const E* a, int64_t ld_a, const E* b, int64_t ld_b,
                                                 int depth, float* c, int64_t ld_c, int rows, int cols,
                                                 bool add) {
  int n = 0;
  for (; n + 2 * kWidth <= cols; n += 2 * kWidth)
    for (int m = 0; m < rows; m += kGemmBlockRows)
      block_gemm_tile<kByRows, 2>(a + m * (kByRows ? ld_a : 1), ld_a, b + n, ld_b, depth, c + m * ld_c + n,
                                  ld_c, add);
  if (n < cols)
    for (int m = 0; m < rows; m += kGemmBlockRows)
      block_gemm_tile<kByRows, 1>(a + m * (kByRows ? ld_a : 1), ld_a, b + n, ld_b, depth, c + m * ld_c + n,
                                  ld_c, add);
}

}  // namespace
}  // namespace esokern::cpu::ESOKERN_ISA
