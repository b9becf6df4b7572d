// What every back end checks of the ops on rows, fused_linear, add_norm, unmask_sample and masked_cross_entropy with its
// gradient: shapes, strides, dtypes, and shared memory by the pointers alone, so it serves host and device memory.
// Functions have internal linkage (see common/hd.h).
#pragma once

#include "ops.h"

namespace esokern {

static inline int64_t element_size(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

// Do the rows of two matrices share memory? Columns side by side in one buffer do not.
static inline bool overlap(const Tensor& a, const Tensor& b) {
  if (!a.given() || !b.given()) return false;
  if (a.shape[0] * a.shape[1] == 0 || b.shape[0] * b.shape[1] == 0) return false;
  const int64_t size = element_size(a.dtype);
  const auto bytes = [&](const Tensor& t) { return ((t.shape[0] - 1) * t.stride[0] + t.shape[1]) * size; };
  const char* a_begin = static_cast<const char*>(a.data);
  const char* b_begin = static_cast<const char*>(b.data);
  if (a_begin + bytes(a) <= b_begin || b_begin + bytes(b) <= a_begin) return false;
  const int64_t row = a.stride[0] * size;
  if (a.stride[0] != b.stride[0] || row == 0) return true;
  const int64_t offset = ((b_begin - a_begin) % row + row) % row;
  return offset < a.shape[1] * size || offset + b.shape[1] * size > row;
}

// The same elements of the same memory: each is read before it is written.
static inline bool same_rows(const Tensor& a, const Tensor& b) {
  return a.data == b.data && a.stride[0] == b.stride[0];
}

static inline bool is_matrix(const Tensor& t, int64_t rows, int64_t columns) {
  return !t.given() || (t.ndim == 2 && t.shape[0] == rows && t.shape[1] == columns);
}

static inline bool is_vector(const Tensor& t, int64_t size) {
  return !t.given() || (t.ndim == 1 && t.shape[0] == size && (t.stride[0] == 1 || size <= 1));
}

static inline bool contiguous_rows(const Tensor& t) {
  return !t.given() || t.stride[1] == 1 || t.shape[1] <= 1;
}

static inline void check_args(const FusedLinearArgs& args) {
  const int64_t rows = args.x.shape[0], in_features = args.x.shape[1], out_features = args.weight.shape[0];
  ESOKERN_CHECK(
      is_matrix(args.x, rows, in_features) && is_matrix(args.weight, out_features, in_features) &&
          is_matrix(args.out, rows, out_features) && is_matrix(args.residual, rows, out_features),
      "fused_linear: x is [rows, in_features], weight [out_features, in_features], out and residual "
      "[rows, out_features]");
  const Tensor* const matrices[] = {&args.x, &args.weight, &args.out, &args.residual};
  for (const Tensor* t : matrices)
    ESOKERN_CHECK(contiguous_rows(*t), "fused_linear: last dimensions must be contiguous, stride",
                  t->stride[1]);
  ESOKERN_CHECK(is_vector(args.bias, out_features), "fused_linear: bias must be a contiguous [out_features]");
  ESOKERN_CHECK(!overlap(args.x, args.out),
                "fused_linear: out shares memory with x, which is still read when out is written");
}

static inline void check_args(const AddNormArgs& args) {
  const int64_t rows = args.out.shape[0], hidden = args.out.shape[1];
  const bool gathered = args.tokens.given();
  ESOKERN_CHECK(is_matrix(args.out, rows, hidden) && is_matrix(args.sum, rows, hidden) &&
                    is_matrix(args.x, gathered ? args.x.shape[0] : rows, hidden) &&
                    is_matrix(args.residual, rows, hidden),
                "add_norm: out, sum, x and residual are [rows, hidden]; with tokens x is [vocab, hidden]");
  const Tensor* const matrices[] = {&args.out, &args.sum, &args.x, &args.residual};
  for (const Tensor* t : matrices)
    ESOKERN_CHECK(contiguous_rows(*t), "add_norm: last dimensions must be contiguous, stride", t->stride[1]);
  ESOKERN_CHECK(!gathered || (args.tokens.ndim == 1 && args.tokens.shape[0] == rows),
                "add_norm: tokens must be [rows]");
  ESOKERN_CHECK(is_vector(args.weight, hidden) && is_vector(args.bias, hidden),
                "add_norm: weight and bias must be contiguous [hidden]");
  const Tensor* const outputs[] = {&args.out, &args.sum};
  for (const Tensor* written : outputs) {
    ESOKERN_CHECK(!overlap(*written, args.x) || (!gathered && same_rows(*written, args.x)),
                  "add_norm: an output shares memory with x without being x itself");
    ESOKERN_CHECK(!overlap(*written, args.residual) || same_rows(*written, args.residual),
                  "add_norm: an output shares memory with residual without being residual itself");
  }
  ESOKERN_CHECK(!overlap(args.out, args.sum), "add_norm: out and sum share memory");
}

static inline void check_args(const UnmaskSampleArgs& args) {
  ESOKERN_CHECK(args.logits.given() != (args.hidden.given() && args.weight.given()),
                "unmask_sample: either logits or hidden and weight");
  const Tensor* const matrices[] = {&args.hidden, &args.weight, &args.logits};
  for (const Tensor* t : matrices)
    ESOKERN_CHECK(
        !t->given() || (t->ndim == 2 && contiguous_rows(*t)),
        "unmask_sample: hidden, weight and logits must be matrices with a contiguous last dimension");
  ESOKERN_CHECK(!args.hidden.given() ||
                    (args.weight.dtype == args.hidden.dtype && args.weight.shape[1] == args.hidden.shape[1]),
                "unmask_sample: weight must be [vocab, hidden_size] in the dtype of hidden");
  ESOKERN_CHECK(!args.bias.given() || (args.hidden.given() && args.bias.dtype == args.hidden.dtype &&
                                       is_vector(args.bias, args.weight.shape[0])),
                "unmask_sample: bias must be a contiguous [vocab] in the dtype of hidden");
  ESOKERN_CHECK(args.tokens.given() && args.invalid.given(),
                "unmask_sample: tokens and invalid are written always");
  // ptr() refuses a wrong dtype: here, where an exception can still travel.
  const Tensor* const floats[] = {&args.logprob, &args.prob,  &args.margin,      &args.entropy, &args.lse,
                                  &args.score,   &args.top_p, &args.temperature, &args.min_p};
  for (const Tensor* t : floats) t->ptr<float>();
  const Tensor* const integers[] = {&args.tokens, &args.seed, &args.positions, &args.step};
  for (const Tensor* t : integers) t->ptr<int64_t>();
  args.top_k.ptr<int32_t>();
  args.invalid.ptr<uint8_t>();
}

static inline void check_lm_head(const Tensor& hidden, const Tensor& weight, const Tensor& bias,
                                 const Tensor& targets) {
  const Tensor* const matrices[] = {&hidden, &weight};
  for (const Tensor* t : matrices)
    ESOKERN_CHECK(
        t->ndim == 2 && contiguous_rows(*t),
        "masked_cross_entropy: hidden and weight must be matrices with a contiguous last dimension");
  ESOKERN_CHECK(weight.dtype == hidden.dtype && weight.shape[1] == hidden.shape[1],
                "masked_cross_entropy: weight must be [vocab, hidden_size] in the dtype of hidden");
  ESOKERN_CHECK(!bias.given() || (bias.dtype == hidden.dtype && is_vector(bias, weight.shape[0])),
                "masked_cross_entropy: bias must be a contiguous [vocab] in the dtype of hidden");
  ESOKERN_CHECK(weight.shape[0] >= 1 && weight.shape[0] < INT32_MAX - 128,
                "masked_cross_entropy: from 1 to 2^31 - 130 ids, vocab", weight.shape[0]);
  targets.ptr<int64_t>();  // refuses a wrong dtype
  ESOKERN_CHECK(targets.given() && is_vector(targets, hidden.shape[0]),
                "masked_cross_entropy: targets must be a contiguous [rows]");
}

// A value per row, which a call cannot do without.
static inline void check_row_floats(const Tensor& values, const Tensor& hidden) {
  values.ptr<float>();
  ESOKERN_CHECK(values.given() && is_vector(values, hidden.shape[0]),
                "masked_cross_entropy: lse, target_logit and grad must be contiguous [rows]");
}

static inline void check_args(const MaskedCrossEntropyArgs& args) {
  check_lm_head(args.hidden, args.weight, args.bias, args.targets);
  check_row_floats(args.lse, args.hidden);
  check_row_floats(args.target_logit, args.hidden);
}

static inline void check_args(const MaskedCrossEntropyBackwardArgs& args) {
  check_lm_head(args.hidden, args.weight, args.bias, args.targets);
  check_row_floats(args.lse, args.hidden);
  check_row_floats(args.grad, args.hidden);
  ESOKERN_CHECK(
      args.dlogits.given() && is_matrix(args.dlogits, args.hidden.shape[0], args.weight.shape[0]) &&
          contiguous_rows(args.dlogits) && args.dlogits.dtype == args.hidden.dtype,
      "masked_cross_entropy: dlogits must be [rows, vocab] in the dtype of hidden, its last dimension "
      "contiguous");
  ESOKERN_CHECK(!overlap(args.dlogits, args.hidden) && !overlap(args.dlogits, args.weight),
                "masked_cross_entropy: dlogits shares memory with hidden or weight");
}

}  // namespace esokern
