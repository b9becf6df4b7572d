// sum = residual + x, where x may be gathered rows of a table; out = normalize(sum) * weight + bias,
//   normalize(s) = (s - mean) / sqrt(var + eps) over the row, of the sum as it is stored.
// Work: a task is a block of rows; a row is summed into a float buffer that its three passes then read.
// Memory: hidden floats per thread; x and residual are read once.
// Limits: f32, bf16, f16 storage, arithmetic in float; last dimensions contiguous; out and sum may be x or residual
//   themselves, element for element, and share memory with nothing else.
#include <string.h>

#include "check_rows.h"
#include "cpu/dispatch_dtype.h"
#include "cpu/normalize_row.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace esokern::cpu::ESOKERN_ISA {
namespace {

// Elements per task; what has only one task starts no threads.
constexpr int64_t kTaskElements = 16 * 1024;

// values = x + residual rounded to T, also stored in sum; residual and sum may be null.
template <class T>
void add_row(const T* x, const T* residual, int64_t hidden, T* sum, float* values) {
  for (int64_t d = 0; d < hidden; d += kWidth) {
    const int count = hidden - d < kWidth ? static_cast<int>(hidden - d) : kWidth;
    Vec v = count == kWidth ? load(x + d) : load_partial(x + d, count);
    if (residual != nullptr) v += count == kWidth ? load(residual + d) : load_partial(residual + d, count);
    T rounded[kWidth];
    store_as(rounded, v);
    if (sum != nullptr) memcpy(sum + d, rounded, count * sizeof(T));
    store(values + d, load(rounded));
  }
}

template <class T>
void launch(const AddNormArgs& args, int64_t rows, int64_t hidden) {
  const T* x = args.x.ptr<T>();
  const int64_t* tokens = args.tokens.ptr<int64_t>();
  const T* residual = args.residual.ptr<T>();
  const T* weight = args.weight.ptr<T>();
  const T* bias = args.bias.ptr<T>();
  T* out = args.out.ptr<T>();
  T* sum = args.sum.ptr<T>();
  const int64_t padded = (hidden + kWidth - 1) / kWidth * kWidth;
  const int64_t task_rows = kTaskElements / padded > 0 ? kTaskElements / padded : 1;
  const int64_t tasks = (rows + task_rows - 1) / task_rows;
  const Scratch<float> values((tasks == 1 ? 1 : max_threads()) * padded);
  parallel_for(tasks, [&](int64_t task) {
    float* row_values = values.data + (tasks == 1 ? 0 : thread_index()) * padded;
    for (int64_t r = task * task_rows; r < rows && r < (task + 1) * task_rows; ++r) {
      const int64_t from = tokens == nullptr ? r : tokens[r * args.tokens.stride[0]];
      add_row(x + from * args.x.stride[0],
              residual == nullptr ? nullptr : residual + r * args.residual.stride[0], hidden,
              sum == nullptr ? nullptr : sum + r * args.sum.stride[0], row_values);
      normalize_row(row_values, hidden, args.eps, weight, bias, out + r * args.out.stride[0]);
    }
  });
}

}  // namespace

void add_norm(const AddNormArgs& args) {
  check_args(args);
  const int64_t rows = args.out.shape[0], hidden = args.out.shape[1];
  if (args.tokens.given()) {
    const int64_t* tokens = args.tokens.ptr<int64_t>();
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = tokens[r * args.tokens.stride[0]];
      ESOKERN_CHECK(token >= 0 && token < args.x.shape[0], "add_norm: tokens: each must be a row of x",
                    token);
    }
  }
  if (rows == 0 || hidden == 0) return;
  dispatch_dtype(args.x.dtype, [&](auto type) { launch<decltype(type)>(args, rows, hidden); });
}

}  // namespace esokern::cpu::ESOKERN_ISA
