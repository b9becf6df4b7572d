// The LM head, hidden weight^T + bias, as tiles of gemm_tile.cuh whose logits come to lanes that share a row
// (sample_tile.cuh): what unmask_sample and masked_cross_entropy have in common.
#pragma once

#include "cuda/gemm_tile.cuh"
#include "cuda/sample_tile.cuh"

namespace esokern::cuda {
namespace {

// hidden weight^T, of the rows that `rows` lists.
template <class T>
GemmProblem<T> head_gemm(const Tensor& hidden, const Tensor& weight, int64_t shift, const int32_t* rows) {
  GemmProblem<T> gemm = {.weight = weight.ptr<T>(),
                         .x = hidden.ptr<T>(),
                         .x_rows = rows,
                         .ld_weight = weight.stride[0],
                         .ld_x = hidden.stride[0],
                         .depth = hidden.shape[1],
                         .ids = weight.shape[0],
                         .rows = hidden.shape[0],
                         .shift = shift,
                         .aligned = false};
  gemm.aligned = gemm_aligned(gemm);
  return gemm;
}

// A tile of sums on its way to lanes that share a row: through the free stage of the pipeline, kLines rows at a time.
template <class T, int kRows>
struct HeadTile {
  using Tile = GemmTile<T, kRows>;
  static constexpr int kLines = kRows < 32 ? kRows : 32;
  static constexpr int kBytes = LogitsTile<kLines>::kBytes;

  // Of the four ids whose sums this thread has.
  static __device__ __forceinline__ Float4 load_bias(const Columns& p, const T* bias, int64_t column) {
    Float4 four = {};
    const int64_t first = column + threadIdx.x / kWarpSize * 32 + threadIdx.x % kWarpSize / 4 * 4 - p.shift;
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (bias != nullptr && first + c >= 0 && first + c < p.vocab) four.value[c] = to_float(bias[first + c]);
    return four;
  }

  // body(tile, line, row) for every row of the tile below `rows`, by whole warps, 8 lanes a row: sum + bias of the row
  // is line `line` of `tile`. Behind `rows` the body is called too, as far as a warp has rows to do; the sums are
  // those of rows that do not exist. Begins after a barrier and ends with one.
  template <class Body>
  static __device__ __forceinline__ void for_rows(const typename Tile::Sums& sums, const Float4& bias,
                                                  unsigned char* scratch, int64_t rows, const Body& body) {
    const LogitsTile<kLines> tile = {scratch};
#pragma unroll 1
    for (int begin = 0; begin < kRows && begin < rows; begin += kLines) {
#pragma unroll
      for (int part = 0; part < kRows; part += kLines)
        if (part == begin) put_rows(sums, part, bias, tile);
      block_sync();
#pragma unroll 1
      for (int i = 0; i < kLines && begin + i < rows; i += Tile::kThreads / kRowLanes) {
        const int line = i + threadIdx.x / kRowLanes;
        body(tile, line, begin + line);
      }
      block_sync();
    }
  }

 private:
  // Sums of rows part .. part + kLines - 1, with bias.
  static __device__ __forceinline__ void put_rows(const typename Tile::Sums& sums, int part,
                                                  const Float4& bias, LogitsTile<kLines> tile) {
    const int warp = threadIdx.x / kWarpSize, g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kLines / 8; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        Float4 x;
#pragma unroll
        for (int c = 0; c < 4; ++c) x.value[c] = Tile::sum(sums, part / 8 + n, j, c) + bias.value[c];
        *tile.at(8 * n + 2 * t + j, warp, g) = x;
      }
  }
};

}  // namespace
}  // namespace esokern::cuda
