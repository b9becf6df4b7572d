// The LM head of unmask_sample: gemm_tile.cuh with the sampler as the epilogue of its tiles.
#pragma once

#include "cuda/gemm_tile.cuh"
#include "cuda/sample_tile.cuh"

namespace esokern::cuda {
namespace {

// The sampler behind a tile of the GEMM. The sums pass through the free stage of its pipeline, up to 32 rows at a time.
template <class T, int kRows>
class SampleEpilogue {
  using Tile = GemmTile<T, kRows>;
  static constexpr int kLines = kRows < 32 ? kRows : 32;
  static_assert(LogitsTile<kLines>::kBytes + kRows * (sizeof(Row) + sizeof(float)) <= Tile::kStageBytes);

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
    const LogitsTile<kLines> tile = {scratch};
    Row* rows = reinterpret_cast<Row*>(scratch + LogitsTile<kLines>::kBytes);
    float* floors = reinterpret_cast<float*>(rows + kRows);
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, g = lane / 4;
    Logits4 bias = {};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int64_t id = column + 32 * warp + 4 * g + c - p_.shift;
      if (bias_ != nullptr && id >= 0 && id < p_.vocab) bias.value[c] = to_float(bias_[id]);
    }
    block_sync();
    if (threadIdx.x < kRows) {
      rows[threadIdx.x] = row_;
      floors[threadIdx.x] = float_of_order(floor_);
    }
#pragma unroll 1
    for (int begin = 0; begin < kRows && first + begin < count_; begin += kLines) {
#pragma unroll
      for (int part = 0; part < kRows; part += kLines)
        if (part == begin) put_rows(sums, part, bias, tile);
      block_sync();
#pragma unroll 1
      for (int i = 0; i < kLines && first + begin + i < count_; i += Tile::kThreads / kRowLanes) {
        const int line = i + threadIdx.x / kRowLanes;
        const int64_t slot = first + begin + line;
        finish_tile(p_, rows[begin + line], floors[begin + line], slot < count_, tile, line, slot, column);
      }
      block_sync();
    }
  }

 private:
  // Sums of rows part .. part + kLines - 1, with bias.
  __device__ __forceinline__ static void put_rows(const typename Tile::Sums& sums, int part,
                                                  const Logits4& bias, LogitsTile<kLines> tile) {
    const int warp = threadIdx.x / kWarpSize, g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kLines / 8; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        Logits4 x;
#pragma unroll
        for (int c = 0; c < 4; ++c) x.value[c] = Tile::sum(sums, part / 8 + n, j, c) + bias.value[c];
        *tile.at(8 * n + 2 * t + j, warp, g) = x;
      }
  }

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
