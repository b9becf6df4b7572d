// What both back ends check of unmask_select: shapes, dtypes, strides and shared memory, so it serves host and device
// memory. Windows are values: the CPU kernel refuses those outside of the text, the CUDA kernel reports them as -1.
// Functions have internal linkage (see common/hd.h).
#pragma once

#include "check_rows.h"

namespace esokern {

// Might two int64 matrices share memory? By the addresses of their first and last elements.
static inline bool may_overlap(const Tensor& a, const Tensor& b) {
  if (a.shape[0] * a.shape[1] == 0 || b.shape[0] * b.shape[1] == 0) return false;
  const auto end = [](const Tensor& t) {
    return static_cast<const int64_t*>(t.data) + (t.shape[0] - 1) * t.stride[0] +
           (t.shape[1] - 1) * t.stride[1] + 1;
  };
  return static_cast<const int64_t*>(a.data) < end(b) && static_cast<const int64_t*>(b.data) < end(a);
}

static inline void check_args(const UnmaskSelectArgs& args) {
  const Tensor &tokens = args.tokens, &proposed = args.proposed;
  ESOKERN_CHECK(tokens.ndim == 2 && proposed.ndim == 2 && proposed.shape[0] == tokens.shape[0],
                "unmask_select: tokens is [batch, length], proposed [batch, width]; dimensions of tokens",
                tokens.ndim);
  const int64_t batch = tokens.shape[0], length = tokens.shape[1], width = proposed.shape[1];
  ESOKERN_CHECK(
      (tokens.stride[1] == 1 || length <= 1) && (tokens.stride[0] == length || batch <= 1 || length == 0),
      "unmask_select: tokens must be contiguous, row stride", tokens.stride[0]);
  ESOKERN_CHECK(width < INT32_MAX, "unmask_select: width must be below 2^31 - 1", width);
  ESOKERN_CHECK(args.confidence.given() && is_matrix(args.confidence, batch, width) &&
                    is_matrix(args.entropy, batch, width) && is_matrix(args.transfer_index, batch, width),
                "unmask_select: confidence, entropy and transfer_index must be [batch, width], width", width);
  ESOKERN_CHECK(is_matrix(args.editable, batch, length),
                "unmask_select: editable must be [batch, length], length", length);
  ESOKERN_CHECK(args.num_masked.given() && args.num_transferred.given() && args.window_start.given(),
                "unmask_select: num_masked, num_transferred and window_start are needed always");
  ESOKERN_CHECK(!args.entropy_bound.given() || args.entropy.given(),
                "unmask_select: entropy_bound needs entropy");
  ESOKERN_CHECK(!args.temperature.given() || (args.seed.given() && args.step.given()),
                "unmask_select: temperature needs seed and step");
  const Tensor* const per_row[] = {
      &args.num_masked,     &args.num_transferred, &args.done,      &args.window_start,
      &args.window_length,  &args.num_select,      &args.threshold, &args.factor,
      &args.entropy_bound,  &args.temperature,     &args.seed,      &args.step,
      &args.edit_threshold, &args.remask_threshold};
  for (const Tensor* t : per_row)
    ESOKERN_CHECK(is_vector(*t, batch), "unmask_select: values per row must be a contiguous [batch], batch",
                  batch);

  // ptr() refuses a wrong dtype: here, where an exception can still travel.
  const Tensor* const floats[] = {&args.confidence,     &args.entropy,         &args.threshold,
                                  &args.factor,         &args.entropy_bound,   &args.temperature,
                                  &args.edit_threshold, &args.remask_threshold};
  for (const Tensor* t : floats) t->ptr<float>();
  const Tensor* const longs[] = {&tokens,    &proposed, &args.window_start, &args.window_length,
                                 &args.seed, &args.step};
  for (const Tensor* t : longs) t->ptr<int64_t>();
  const Tensor* const integers[] = {&args.num_masked, &args.num_transferred, &args.num_select};
  for (const Tensor* t : integers) t->ptr<int32_t>();
  const Tensor* const flags[] = {&args.transfer_index, &args.done, &args.editable};
  for (const Tensor* t : flags) t->ptr<uint8_t>();
  ESOKERN_CHECK(!may_overlap(tokens, proposed),
                "unmask_select: proposed shares memory with tokens, which are written while it is read");
}

}  // namespace esokern
