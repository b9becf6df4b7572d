// weight x^T in tiles of 128 ids (rows of weight) x kRows rows (of x), for kernels that differ in what they do with a
//   finished tile: sample from it, or store it.
// Work: a block is 4 warps; warp w owns ids 32 w .. 32 w + 31 of the tile and all its rows. Ids are the M side of
//   mma.m16n8k16, rows the N side. A persistent block walks tiles blockIdx.x, + gridDim.x, ..., row blocks innermost,
//   so that blocks at work share weight tiles in L2. Every dot product adds over depth in one order: it does not
//   depend on kRows, the grid or the other rows.
// Memory: lines of 128 bytes (kBlockK elements) of both operands in kStages stages; the fetches run on over the ends
//   of tiles. Chunks of 16 bytes are swizzled so that neither ldmatrix nor the float32 reads meet in a bank.
// Limits: any depth, any number of ids and rows; what is not aligned to 16 bytes is copied element by element.
// Order of ids: ldmatrix takes any row address, so id 4 g + c of a warp's 32 sits where lane 4 g + t holds the four
//   consecutive ids c = 0 .. 3 of rows 8 n + 2 t and 8 n + 2 t + 1.
#pragma once

#include <string.h>

#include "cuda/device.cuh"
#include "cuda/float4.cuh"

namespace esokern::cuda {
namespace {

template <class T>
struct GemmProblem {
  const T* weight;        // [ids, depth]
  const T* x;             // [any, depth]
  const int32_t* x_rows;  // [rows]: which rows of x; null = 0, 1, 2, ...
  int64_t ld_weight, ld_x, depth;
  int64_t ids, rows;
  int64_t shift;  // column c of the tiles is id c - shift
  bool aligned;   // gemm_aligned
};

// Rows of a tile for a call with so many of them.
inline int gemm_rows(int64_t rows) {
  return rows <= 16 ? 16 : rows <= 64 ? 64 : 128;
}

// Can both operands be copied in pieces of 16 bytes?
template <class T>
bool gemm_aligned(const GemmProblem<T>& p) {
  const auto whole = [](int64_t elements) { return elements * static_cast<int64_t>(sizeof(T)) % 16 == 0; };
  const auto address = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  return address(p.weight) && address(p.x) && whole(p.ld_weight) && whole(p.ld_x) && whole(p.depth);
}

template <class T, int kRows>
struct GemmTile {
  static constexpr int kIds = 128;
  static constexpr int kThreads = 128;
  static constexpr int kLineBytes = 128;
  static constexpr int kBlockK = kLineBytes / sizeof(T);
  static constexpr int kStageBytes = (kIds + kRows) * kLineBytes;
  static constexpr int kStages = kRows == 128 ? 3 : 4;  // 96 KB, 96 KB (64 rows), 72 KB (16 rows)
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kBlocksPerMultiprocessor = kRows == 16 ? 3 : 2;  // that fit into sm_90
  static_assert(kSharedBytes <= kMaxSharedBytes && kRows % 16 == 0);

  // [n][2][4]: lane 4 g + t of a warp holds id 4 g + c of row 8 n + 2 t + j in [n][c / 2][2 (c % 2) + j].
  using Sums = float[kRows / 8][2][4];

  static __device__ __forceinline__ float sum(const Sums& sums, int n, int j, int c) {
    return sums[n][c / 2][2 * (c % 2) + j];
  }
  static __host__ __device__ __forceinline__ int64_t row_blocks(const GemmProblem<T>& p) {
    return (p.rows + kRows - 1) / kRows;
  }
  static __host__ __device__ __forceinline__ int64_t tiles(const GemmProblem<T>& p) {
    return row_blocks(p) * ((p.shift + p.ids + kIds - 1) / kIds);
  }
  static int64_t blocks(const GemmProblem<T>& p) {
    const int64_t resident = int64_t{kBlocksPerMultiprocessor} * multiprocessors();
    return tiles(p) < resident ? tiles(p) : resident;
  }
};

// What a thread copies of every stage: chunk threadIdx.x % 8 of the lines threadIdx.x / 8 + 16 i of both operands.
template <class T, int kRows>
class GemmFetch {
  using Tile = GemmTile<T, kRows>;

 public:
  __device__ __forceinline__ GemmFetch(const GemmProblem<T>& problem, unsigned char* stages)
      : p_(problem), stages_(stages), line_(threadIdx.x / 8), chunk_(threadIdx.x % 8), tile_(blockIdx.x) {
    begin_tile();
  }

  // Issues the next stage and closes its group, which is empty behind the last tile.
  __device__ __forceinline__ void issue() {
    if (tile_ < Tile::tiles(p_)) {
      unsigned char* stage = stages_ + stage_ * Tile::kStageBytes;
      if (p_.aligned)
        copy_chunks(smem_address(stage));
      else
        copy_elements(stage);
      k_ += Tile::kBlockK;
      if (k_ >= p_.depth) {
        tile_ += gridDim.x;
        begin_tile();
      }
    }
    copy_async_commit();
    stage_ = stage_ + 1 == Tile::kStages ? 0 : stage_ + 1;
  }

 private:
  static constexpr int kElements = 16 / sizeof(T);

  __device__ __forceinline__ int32_t row_of(int64_t r) const {
    return r >= p_.rows ? -1 : p_.x_rows != nullptr ? p_.x_rows[r] : static_cast<int32_t>(r);
  }

  __device__ __forceinline__ void begin_tile() {
    k_ = 0;
    if (tile_ >= Tile::tiles(p_)) return;
    const int64_t row_blocks = Tile::row_blocks(p_);
    id_ = tile_ / row_blocks * Tile::kIds + line_ - p_.shift;
    first_row_ = tile_ % row_blocks * kRows + line_;
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) row_[i] = row_of(first_row_ + 16 * i);
  }

  __device__ __forceinline__ void copy_chunks(uint32_t stage) const {
    const int64_t k = k_ + chunk_ * kElements;
    const bool inside = k < p_.depth;
    uint32_t to = stage + line_ * Tile::kLineBytes;
    const T* from = p_.weight + id_ * p_.ld_weight + k;
#pragma unroll
    for (int i = 0; i < Tile::kIds / 16; ++i) {
      const int64_t id = id_ + 16 * i;
      copy_async_16(to + 16 * i * Tile::kLineBytes + (chunk_ ^ ((line_ / 4 + 4 * i) % 8)) * 16, from,
                    inside && id >= 0 && id < p_.ids);
      from += 16 * p_.ld_weight;
    }
    to += Tile::kIds * Tile::kLineBytes;
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i)
      copy_async_16(to + 16 * i * Tile::kLineBytes + (chunk_ ^ (line_ % 8)) * 16,
                    p_.x + row_[i] * p_.ld_x + k, inside && row_[i] >= 0);
  }

  // What is not aligned: slower, and rolled so that it costs no registers where everything is.
  __device__ __forceinline__ void copy_elements(unsigned char* stage) const {
    const int64_t k = k_ + chunk_ * kElements;
#pragma unroll 1
    for (int i = 0; i < Tile::kIds + kRows; i += 16) {
      const bool is_id = i < Tile::kIds;
      const int64_t id = id_ + i, row = is_id ? -1 : row_of(first_row_ + i - Tile::kIds);
      const T* line = is_id ? p_.weight + id * p_.ld_weight : p_.x + row * p_.ld_x;
      const bool valid = is_id ? id >= 0 && id < p_.ids : row >= 0;
      T elements[kElements];
#pragma unroll
      for (int e = 0; e < kElements; ++e) elements[e] = valid && k + e < p_.depth ? line[k + e] : T{};
      Bytes16 bytes;
      memcpy(&bytes, elements, sizeof bytes);
      store_16(stage + (i + line_) * Tile::kLineBytes + (chunk_ ^ (is_id ? (i + line_) / 4 : line_) % 8) * 16,
               bytes);
    }
  }

  const GemmProblem<T>& p_;
  unsigned char* stages_;
  int line_, chunk_, stage_ = 0;
  int64_t tile_, k_ = 0, id_ = 0, first_row_ = 0;
  int32_t row_[kRows / 16] = {};
};

// sums += one stage, 16-bit types.
template <class T, int kRows>
__device__ __forceinline__ void multiply(const unsigned char* stage,
                                         typename GemmTile<T, kRows>::Sums& sums) {
  constexpr int kPairs = kRows / 16, kSteps = GemmTile<T, kRows>::kBlockK / 16 * kPairs;
  const int warp = threadIdx.x / 32, matrix = threadIdx.x % 32 / 8, r = threadIdx.x % 8;
  const uint32_t base = smem_address(stage);
  const uint32_t ids = base + (32 * warp + 4 * r + matrix % 2) * 128;
  const uint32_t rows = base + (GemmTile<T, kRows>::kIds + matrix / 2 * 8 + r) * 128;
  const auto load_ids = [&](int k, uint32_t (&a)[2][4]) {
    const uint32_t at = ids + ((2 * k + matrix / 2) ^ r) * 16;
    ldmatrix_x4(a[0], at);
    ldmatrix_x4(a[1], at + 2 * 128);
  };
  const auto load_rows = [&](int k, int pair, uint32_t (&b)[4]) {
    ldmatrix_x4(b, rows + pair * 16 * 128 + ((2 * k + matrix % 2) ^ r) * 16);
  };
  // The fragments of a step are loaded while the one before it is multiplied.
  uint32_t a[2][2][4], b[2][4];
  load_ids(0, a[0]);
  load_rows(0, 0, b[0]);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int k = step / kPairs, pair = step % kPairs, next = step + 1;
    if (next < kSteps) {
      if (next % kPairs == 0) load_ids(next / kPairs, a[next / kPairs % 2]);
      load_rows(next / kPairs, next % kPairs, b[next % 2]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int m = 0; m < 2; ++m)
        mma_m16n8k16<T>(sums[2 * pair + n][m], a[k % 2][m], b[step % 2][2 * n], b[step % 2][2 * n + 1]);
  }
}

// The same for float32, the same sums in the same lanes.
template <int kRows>
__device__ __forceinline__ void multiply_float(const unsigned char* stage,
                                               typename GemmTile<float, kRows>::Sums& sums) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const unsigned char* ids = stage + (32 * warp + 4 * g) * 128;
  const unsigned char* rows = stage + (GemmTile<float, kRows>::kIds + 2 * t) * 128;
#pragma unroll 1
  for (int chunk = 0; chunk < 8; ++chunk) {
    Float4 w[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) w[c] = *reinterpret_cast<const Float4*>(ids + c * 128 + (chunk ^ g) * 16);
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const Float4 x =
            *reinterpret_cast<const Float4*>(rows + (8 * n + j) * 128 + (chunk ^ (2 * t + j)) * 16);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float part = w[c].value[0] * x.value[0];  // by fours: a quarter of the roundings of a long sum
#pragma unroll
          for (int e = 1; e < 4; ++e) part += w[c].value[e] * x.value[e];
          sums[n][c / 2][2 * (c % 2) + j] += part;
        }
      }
  }
}

// All tiles of the block. For every tile, in all threads together,
//   epilogue.begin(column, row)                  before its first stage is waited for: time to fetch what is needed
//   epilogue.finish(sums, scratch, column, row)  with its first column (= id + shift) and first row
// scratch: kStageBytes of shared memory, free once a barrier tells that all warps are done with their sums; it is
// the epilogue's until finish returns.
template <class T, int kRows, class Epilogue>
__device__ __forceinline__ void gemm_tiles(const GemmProblem<T>& p, unsigned char* stages,
                                           Epilogue& epilogue) {
  using Tile = GemmTile<T, kRows>;
  const int64_t tiles = Tile::tiles(p), row_blocks = Tile::row_blocks(p);
  GemmFetch<T, kRows> fetch(p, stages);
#pragma unroll 1
  for (int i = 0; i < Tile::kStages - 1; ++i) fetch.issue();
  int stage = 0;
#pragma unroll 1
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t column = tile / row_blocks * Tile::kIds, row = tile % row_blocks * kRows;
    epilogue.begin(column, row);
    typename Tile::Sums sums = {};
    unsigned char* current = stages;
    int64_t k = 0;
#pragma unroll 1
    do {
      copy_async_wait<Tile::kStages - 2>();
      block_sync();
      fetch.issue();
      current = stages + stage * Tile::kStageBytes;
      if constexpr (sizeof(T) == 4)
        multiply_float<kRows>(current, sums);
      else
        multiply<T, kRows>(current, sums);
      stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
      k += Tile::kBlockK;
    } while (k < p.depth);
    epilogue.finish(sums, current, column, row);
  }
  copy_async_wait<0>();
}

}  // namespace
}  // namespace esokern::cuda
