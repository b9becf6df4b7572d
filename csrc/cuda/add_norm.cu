// sum = residual + x, out = normalize(sum) * weight + bias; the kernel, what it costs and its limits: normalize_row.cuh.
// A row whose token is no row of the table becomes NaN, in out and in sum.
#include "check_rows.h"
#include "cuda/normalize_row.cuh"

namespace esokern::cuda {

int64_t add_norm_workspace(const AddNormArgs&) {
  return 0;
}

void add_norm(const AddNormArgs& args, void*, void* stream) {
  check_args(args);
  const int64_t rows = args.out.shape[0], hidden = args.out.shape[1];
  if (rows == 0 || hidden == 0) return;
  dispatch_dtype(args.x.dtype, [&]<class T>() {
    normalize_rows(RowsProblem<T>{.out = args.out.ptr<T>(),
                                  .sum = args.sum.ptr<T>(),
                                  .x = args.x.ptr<T>(),
                                  .tokens = args.tokens.ptr<int64_t>(),
                                  .residual = args.residual.ptr<T>(),
                                  .weight = args.weight.ptr<T>(),
                                  .bias = args.bias.ptr<T>(),
                                  .ld_out = args.out.stride[0],
                                  .ld_sum = args.sum.stride[0],
                                  .ld_x = args.x.stride[0],
                                  .ld_tokens = args.tokens.stride[0],
                                  .ld_residual = args.residual.stride[0],
                                  .rows = rows,
                                  .hidden = hidden,
                                  .vocab = args.x.shape[0],
                                  .eps = args.eps},
                   stream);
  });
}

}  // namespace esokern::cuda
