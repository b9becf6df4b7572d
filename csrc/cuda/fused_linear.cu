// out = residual + activation(normalize(x) weight^T + bias), normalize(x) = (x - mean) / sqrt(var + eps) over
//   in_features.
// Work: the normalisation by a kernel of its own (normalize_row.cuh), then tiles of 128 outputs x 16, 64 or 128 rows
//   through gemm_tile.cuh, whose sums are finished in registers.
// Memory: normalised x in its storage type as torch would round it, [rows, in_features] of scratch, only if asked for.
//   A thread stores four outputs of a row at once, 8 bytes of the 16-bit types, where out and residual are aligned.
// Limits: f32, bf16, f16 storage, accumulation in float; last dimensions contiguous; residual may be out, x may not. A
//   row's result depends on no other row: one order of additions, whatever the tile.
#include <math.h>
#include <string.h>

#include "check_rows.h"
#include "cuda/gemm_tile.cuh"
#include "cuda/normalize_row.cuh"
#include "cuda/outputs.cuh"

namespace esokern::cuda {
namespace {

// x / 2 (1 + tanh(u)) = x / (1 + e^(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3); the constants take e to 2.
__device__ __forceinline__ float gelu_tanh(float x) {
  constexpr float kLinear = -1.5957691216057308f * 1.4426950408889634f, kCubic = 0.044715f * kLinear;
  return x / (1.0f + exp2_fast(x * fmaf(x * x, kCubic, kLinear)));
}

template <class T>
struct Finish {
  T* out;
  const T* bias;      // may be null, like residual
  const T* residual;  // may be out
  int64_t ld_out, ld_residual, rows, columns;
  bool gelu;
  bool together;  // four columns of out and residual can be moved at once
};

// The epilogue of gemm_tiles.
template <class T, int kRows>
class FinishTile {
  using Tile = GemmTile<T, kRows>;

 public:
  __device__ __forceinline__ explicit FinishTile(const Finish<T>& finish) : f_(finish) {}

  __device__ __forceinline__ void begin(int64_t column, int64_t) {
    const int64_t mine = my_column(column);
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      bias_[c] = f_.bias != nullptr && mine + c < f_.columns ? to_float(f_.bias[mine + c]) : 0.0f;
  }

  // In groups of rows: the residual of a whole group is under way before the first of its rows is stored.
  __device__ __forceinline__ void finish(const typename Tile::Sums& sums, unsigned char*, int64_t column,
                                         int64_t row) {
    const int64_t mine = my_column(column);
    if (mine >= f_.columns) return;
#pragma unroll
    for (int group = 0; group < kRows / 4; group += kGroup) {
      Outputs<T> given[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) given[i] = load_residual(my_row(row, group + i), mine);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        float v[kColumns];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          v[c] = Tile::sum(sums, (group + i) / 2, (group + i) % 2, c) + bias_[c];
          if (f_.gelu) v[c] = gelu_tanh(v[c]);
          if (f_.residual != nullptr) v[c] = to_float(given[i].value[c]) + v[c];
        }
        store(v, my_row(row, group + i), mine);
      }
    }
  }

 private:
  static constexpr int kGroup = kRows == 64 ? 8 : 4;  // 128 rows have no registers for more

  __device__ __forceinline__ int64_t my_column(int64_t column) const {
    return column + threadIdx.x / kWarpSize * 32 + threadIdx.x % kWarpSize / 4 * kColumns;
  }
  // Of this thread's i-th row, sums[i / 2][i % 2] of gemm_tile.cuh.
  __device__ __forceinline__ int64_t my_row(int64_t row, int i) const {
    return row + 8 * (i / 2) + threadIdx.x % 4 * 2 + i % 2;
  }

  __device__ __forceinline__ Outputs<T> load_residual(int64_t row, int64_t column) const {
    Outputs<T> given = {};
    if (f_.residual == nullptr || row >= f_.rows) return given;
    const T* residual = f_.residual + row * f_.ld_residual + column;
    if (f_.together) return load_outputs(residual);
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (column + c < f_.columns) given.value[c] = residual[c];
    return given;
  }

  __device__ __forceinline__ void store(const float (&v)[kColumns], int64_t row, int64_t column) const {
    if (row >= f_.rows) return;
    T* out = f_.out + row * f_.ld_out + column;
    Outputs<T> result;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) result.value[c] = from_float<T>(v[c]);
    if (f_.together) {
      store_outputs(out, result);
      return;
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (column + c < f_.columns) out[c] = result.value[c];
  }

  const Finish<T>& f_;
  float bias_[kColumns] = {};
};

template <class T, int kRows>
__global__ void __launch_bounds__(GemmTile<T, kRows>::kThreads, 2)
    fused_linear_kernel(GemmProblem<T> problem, Finish<T> finish) {
  Arena arena;
  unsigned char* stages = arena.take<unsigned char>(GemmTile<T, kRows>::kSharedBytes, 1024);
  FinishTile<T, kRows> epilogue(finish);
  gemm_tiles<T, kRows>(problem, stages, epilogue);
}

template <class T, int kRows>
void launch_tiles(const GemmProblem<T>& problem, const Finish<T>& finish, void* stream) {
  using Tile = GemmTile<T, kRows>;
  launch("fused_linear", fused_linear_kernel<T, kRows>, Grid{Tile::blocks(problem)}, Tile::kThreads,
         Tile::kSharedBytes, stream, problem, finish);
}

template <class T>
void run(const FusedLinearArgs& args, void* workspace, void* stream) {
  const int64_t rows = args.x.shape[0], depth = args.x.shape[1], columns = args.weight.shape[0];
  GemmProblem<T> problem{.weight = args.weight.ptr<T>(),
                         .x = args.x.ptr<T>(),
                         .x_rows = nullptr,
                         .ld_weight = args.weight.stride[0],
                         .ld_x = args.x.stride[0],
                         .depth = depth,
                         .ids = columns,
                         .rows = rows,
                         .shift = 0,
                         .aligned = false};
  if (args.normalize_eps >= 0.0f && depth > 0) {
    T* normalized = static_cast<T*>(workspace);
    normalize_rows(RowsProblem<T>{.out = normalized,
                                  .x = problem.x,
                                  .ld_out = depth,
                                  .ld_x = problem.ld_x,
                                  .rows = rows,
                                  .hidden = depth,
                                  .eps = args.normalize_eps},
                   stream);
    problem.x = normalized;
    problem.ld_x = depth;
  }
  problem.aligned = gemm_aligned(problem);
  const T* residual = args.residual.ptr<T>();
  T* out = args.out.ptr<T>();
  const Finish<T> finish{.out = out,
                         .bias = args.bias.ptr<T>(),
                         .residual = residual,
                         .ld_out = args.out.stride[0],
                         .ld_residual = args.residual.stride[0],
                         .rows = rows,
                         .columns = columns,
                         .gelu = args.activation == static_cast<int64_t>(Activation::gelu_tanh),
                         .together = columns % kColumns == 0 && moves_together(out, args.out.stride[0]) &&
                                     moves_together(residual, args.residual.stride[0])};
  switch (gemm_rows(rows)) {
    case 16:
      return launch_tiles<T, 16>(problem, finish, stream);
    case 64:
      return launch_tiles<T, 64>(problem, finish, stream);
    default:
      return launch_tiles<T, 128>(problem, finish, stream);
  }
}

}  // namespace

int64_t fused_linear_workspace(const FusedLinearArgs& args) {
  return args.normalize_eps >= 0.0f ? args.x.shape[0] * args.x.shape[1] * element_size(args.x.dtype) : 0;
}

void fused_linear(const FusedLinearArgs& args, void* workspace, void* stream) {
  check_args(args);
  if (args.out.shape[0] == 0 || args.out.shape[1] == 0) return;
  dispatch_dtype(args.x.dtype, [&]<class T>() { run<T>(args, workspace, stream); });
}

}  // namespace esokern::cuda
