// The LM head of unmask_sample: tiles of logits (head_tile.cuh) with the sampler as their epilogue.
#pragma once

#include "cuda/head_tile.cuh"

namespace esokern::cuda {
namespace {

// The sampler behind a tile of the GEMM.
template <class T, int kRows>
class SampleEpilogue {
  using Tile = GemmTile<T, kRows>;
  using Head = HeadTile<T, kRows>;
  static_assert(Head::kBytes + kRows * (sizeof(Row) + sizeof(float)) <= Tile::kStageBytes);

 public:
  __device__ __forceinline__ SampleEpilogue(const SampleProblem& p, const T* bias, int64_t count)
      : p_(p), bias_(bias), count_(count) {}

  // Thread i fetches what row i asks for.
  __device__ __forceinline__ void begin(int64_t, int64_t first) {
    const int64_t slot = first + threadIdx.x;
    if (threadIdx.x >= kRows || slot >= count_) return;
    row_ = p_.rows[slot];
    floor_ = load_relaxed(p_.floors + slot);
  }

  __device__ __forceinline__ void finish(const typename Tile::Sums& sums, unsigned char* scratch,
                                         int64_t column, int64_t first) {
    Row* rows = reinterpret_cast<Row*>(scratch + Head::kBytes);
    float* floors = reinterpret_cast<float*>(rows + kRows);
    const Float4 bias = Head::load_bias(p_, bias_, column);
    block_sync();
    if (threadIdx.x < kRows) {
      rows[threadIdx.x] = row_;
      floors[threadIdx.x] = float_of_order(floor_);
    }
    Head::for_rows(sums, bias, scratch, count_ - first, [&](auto tile, int line, int row) {
      finish_tile(p_, rows[row], floors[row], first + row < count_, tile, line, first + row, column);
    });
  }

 private:
  const SampleProblem& p_;
  const T* bias_;
  int64_t count_;
  Row row_ = {};
  int32_t floor_ = 0;
};

template <class T, int kRows>
__global__ void __launch_bounds__(GemmTile<T, kRows>::kThreads, 2)
    sample_head(SampleProblem p, GemmProblem<T> gemm, const T* bias) {
  Arena arena;
  unsigned char* stages = arena.take<unsigned char>(GemmTile<T, kRows>::kSharedBytes, 1024);
  gemm.rows = *p.count;
  SampleEpilogue<T, kRows> epilogue(p, bias, gemm.rows);
  gemm_tiles<T, kRows>(gemm, stages, epilogue);
}

}  // namespace
}  // namespace esokern::cuda
