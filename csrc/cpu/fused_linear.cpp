// out = residual + activation(normalize(x) weight^T + bias), normalize(x) = (x - mean) / sqrt(var + eps) over
//   in_features.
// Work: normalisation by blocks of 16 rows, then tasks of 32 rows x 64 outputs, tiles of 16 x 64 through
//   rows_gemm.h.
// Memory: normalised x in its storage type as torch would round it, [rows, in_features], only if asked for; the
//   weight is read once per 32 rows and stays in the caches of the thread that owns its columns.
// Limits: f32, bf16, f16 storage, accumulation in float; last dimensions contiguous; residual may be out, x may
//   not. A row's result depends on no other row: fixed tiles, one order of additions.
#include "check_rows.h"
#include "cpu/dispatch_dtype.h"
#include "cpu/normalize_row.h"
#include "cpu/parallel.h"
#include "cpu/rows_gemm.h"
#include "cpu/scratch.h"

namespace esokern::cpu::ESOKERN_ISA {
namespace {

constexpr int kTaskRows = 32;
constexpr int kTaskColumns = 64;
// Multiply-adds below which starting threads costs more than it gains.
constexpr int64_t kSerialWork = 128 * 1024;

// x / 2 (1 + tanh(u)) = x / (1 + e^(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
ESOKERN_INLINE Vec gelu_tanh(Vec x) {
  const Vec inner = x * fma(x * x, splat(0.044715f * -1.5957691216057308f), splat(-1.5957691216057308f));
  return x / (splat(1.0f) + exp(min(inner, splat(80.0f))));
}

// One row of a tile: bias, activation, residual, store. bias and residual may be null.
template <class T>
void finish_row(const float* sums, int64_t count, const T* bias, bool gelu, const T* residual, T* out) {
  for (int64_t i = 0; i < count; i += kWidth) {
    Vec v = load(sums + i);
    const int rest = count - i < kWidth ? static_cast<int>(count - i) : kWidth;
    if (bias != nullptr) v += rest == kWidth ? load(bias + i) : load_partial(bias + i, rest);
    if (gelu) v = gelu_tanh(v);
    if (residual != nullptr) v = (rest == kWidth ? load(residual + i) : load_partial(residual + i, rest)) + v;
    if (rest == kWidth) {
      store_as(out + i, v);
    } else {
      float lanes[kWidth];
      store(lanes, v);
      for (int j = 0; j < rest; ++j) from_float(lanes[j], out + i + j);
    }
  }
}

template <class T>
void launch(const FusedLinearArgs& args) {
  const int64_t rows = args.x.shape[0], depth = args.x.shape[1], columns = args.weight.shape[0];
  const T* x = args.x.ptr<T>();
  const T* weight = args.weight.ptr<T>();
  const T* bias = args.bias.ptr<T>();
  const T* residual = args.residual.ptr<T>();
  T* out = args.out.ptr<T>();
  const int64_t ld_weight = args.weight.stride[0], ld_residual = args.residual.stride[0];
  const int64_t ld_out = args.out.stride[0], ld_x = args.x.stride[0];
  const bool gelu = args.activation == static_cast<int64_t>(Activation::gelu_tanh);
  const bool normalize = args.normalize_eps >= 0.0f;
  const Scratch<T> normalized(normalize ? rows * depth : 0);

  const auto normalize_block = [&](int64_t block) {
    for (int64_t r = block * kGemmRows; r < rows && r < (block + 1) * kGemmRows; ++r)
      normalize_row<T, T>(x + r * ld_x, depth, args.normalize_eps, nullptr, nullptr,
                          normalized.data + r * depth);
  };
  const int64_t row_tasks = (rows + kTaskRows - 1) / kTaskRows;
  const auto task = [&](int64_t index) {
    const int64_t column = index / row_tasks * kTaskColumns, row_begin = index % row_tasks * kTaskRows;
    const int64_t column_end = column + kTaskColumns < columns ? column + kTaskColumns : columns;
    const int64_t row_end = row_begin + kTaskRows < rows ? row_begin + kTaskRows : rows;
    for (int64_t row = row_begin; row < row_end; row += kGemmRows) {
      const int count = static_cast<int>(row_end - row < kGemmRows ? row_end - row : kGemmRows);
      const T* from[kGemmRows];
      for (int r = 0; r < count; ++r)
        from[r] = normalize ? normalized.data + (row + r) * depth : x + (row + r) * ld_x;
      float sums[kGemmRows * kTaskColumns];
      rows_gemm(from, count, weight, ld_weight, column, column_end, depth, sums, kTaskColumns);
      for (int r = 0; r < count; ++r)
        finish_row(sums + r * kTaskColumns, column_end - column, bias == nullptr ? nullptr : bias + column,
                   gelu, residual == nullptr ? nullptr : residual + (row + r) * ld_residual + column,
                   out + (row + r) * ld_out + column);
    }
  };

  const int64_t blocks = normalize ? (rows + kGemmRows - 1) / kGemmRows : 0;
  const int64_t tasks = row_tasks * ((columns + kTaskColumns - 1) / kTaskColumns);
  if (tasks == 1 || rows * columns * depth <= kSerialWork) {
    for (int64_t i = 0; i < blocks; ++i) normalize_block(i);
    for (int64_t i = 0; i < tasks; ++i) task(i);
    return;
  }
  if (blocks == 1) normalize_block(0);  // while the others wake up anyway
#pragma omp parallel
  {
    if (blocks > 1) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < blocks; ++i) normalize_block(i);
    }
    // Static: in a sequence of calls a thread meets the same columns of a weight again.
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < tasks; ++i) task(i);
  }
}

}  // namespace

void fused_linear(const FusedLinearArgs& args) {
  check_args(args);
  if (args.out.shape[0] == 0 || args.out.shape[1] == 0) return;
  dispatch_dtype(args.x.dtype, [&](auto type) { launch<decltype(type)>(args); });
}

}  // namespace esokern::cpu::ESOKERN_ISA
