// One binding per op, in the order of its Args struct, outputs first; no logic. `Backend` runs the op:
//   static constexpr int32_t kDeviceType;  static void <op>(const Tensors&, const <Op>Args&)
#pragma once

#include <pybind11/pybind11.h>

#include "dlpack.h"
#include "ops.h"

namespace esokern::python {

namespace py = pybind11;

template <class Backend>
void attention(py::handle out, py::handle lse, py::handle q, py::handle k, py::handle v,
               py::handle cu_seqlens_q, py::handle cu_seqlens_k, py::handle k_rank, py::handle prefix_end,
               py::handle window_start, py::handle window_end, float softmax_scale) {
  Tensors tensor(Backend::kDeviceType);
  const AttentionArgs args{.out = tensor(out),
                           .lse = tensor(lse),
                           .q = tensor(q),
                           .k = tensor(k),
                           .v = tensor(v),
                           .cu_seqlens_q = tensor(cu_seqlens_q),
                           .cu_seqlens_k = tensor(cu_seqlens_k),
                           .k_rank = tensor(k_rank),
                           .prefix_end = tensor(prefix_end),
                           .window_start = tensor(window_start),
                           .window_end = tensor(window_end),
                           .softmax_scale = softmax_scale};
  Backend::attention(tensor, args);
}

template <class Backend>
void attention_backward(py::handle dq, py::handle dk, py::handle dv, py::handle q, py::handle k, py::handle v,
                        py::handle out, py::handle lse, py::handle dout, py::handle dlse,
                        py::handle cu_seqlens_q, py::handle cu_seqlens_k, py::handle k_rank,
                        py::handle prefix_end, py::handle window_start, py::handle window_end,
                        float softmax_scale, bool deterministic) {
  Tensors tensor(Backend::kDeviceType);
  const AttentionBackwardArgs args{.dq = tensor(dq),
                                   .dk = tensor(dk),
                                   .dv = tensor(dv),
                                   .q = tensor(q),
                                   .k = tensor(k),
                                   .v = tensor(v),
                                   .out = tensor(out),
                                   .lse = tensor(lse),
                                   .dout = tensor(dout),
                                   .dlse = tensor(dlse),
                                   .cu_seqlens_q = tensor(cu_seqlens_q),
                                   .cu_seqlens_k = tensor(cu_seqlens_k),
                                   .k_rank = tensor(k_rank),
                                   .prefix_end = tensor(prefix_end),
                                   .window_start = tensor(window_start),
                                   .window_end = tensor(window_end),
                                   .softmax_scale = softmax_scale,
                                   .deterministic = deterministic};
  Backend::attention_backward(tensor, args);
}

template <class Backend>
void attention_with_kvcache(py::handle out, py::handle lse, py::handle q, py::handle k_cache,
                            py::handle v_cache, py::handle k, py::handle v, py::handle cache_seqlens,
                            py::handle positions, py::handle rotary_cos, py::handle rotary_sin,
                            py::handle num_clean, py::handle slots, py::handle page_table,
                            py::handle cache_batch_idx, py::handle cu_seqlens_q, py::handle seqused_q,
                            py::handle k_rank, py::handle prefix_end, py::handle window_start,
                            py::handle window_end, int64_t chunk_mask, bool rotary_interleaved, bool commit,
                            float softmax_scale) {
  Tensors tensor(Backend::kDeviceType);
  const AttentionWithKvcacheArgs args{.out = tensor(out),
                                      .lse = tensor(lse),
                                      .q = tensor(q),
                                      .k_cache = tensor(k_cache),
                                      .v_cache = tensor(v_cache),
                                      .k = tensor(k),
                                      .v = tensor(v),
                                      .cache_seqlens = tensor(cache_seqlens),
                                      .positions = tensor(positions),
                                      .rotary_cos = tensor(rotary_cos),
                                      .rotary_sin = tensor(rotary_sin),
                                      .num_clean = tensor(num_clean),
                                      .slots = tensor(slots),
                                      .page_table = tensor(page_table),
                                      .cache_batch_idx = tensor(cache_batch_idx),
                                      .cu_seqlens_q = tensor(cu_seqlens_q),
                                      .seqused_q = tensor(seqused_q),
                                      .k_rank = tensor(k_rank),
                                      .prefix_end = tensor(prefix_end),
                                      .window_start = tensor(window_start),
                                      .window_end = tensor(window_end),
                                      .chunk_mask = chunk_mask,
                                      .rotary_interleaved = rotary_interleaved,
                                      .commit = commit,
                                      .softmax_scale = softmax_scale};
  Backend::attention_with_kvcache(tensor, args);
}

template <class Backend>
void unmask_sample(py::handle tokens, py::handle logprob, py::handle prob, py::handle margin,
                   py::handle entropy, py::handle lse, py::handle score, py::handle invalid,
                   py::handle hidden, py::handle weight, py::handle bias, py::handle logits,
                   py::handle temperature, py::handle top_k, py::handle top_p, py::handle min_p,
                   py::handle seed, py::handle positions, py::handle step, int64_t mask_id,
                   int64_t vocab_start, float logit_softcap, int64_t filter_order, int64_t statistics) {
  Tensors tensor(Backend::kDeviceType);
  const UnmaskSampleArgs args{.tokens = tensor(tokens),
                              .logprob = tensor(logprob),
                              .prob = tensor(prob),
                              .margin = tensor(margin),
                              .entropy = tensor(entropy),
                              .lse = tensor(lse),
                              .score = tensor(score),
                              .invalid = tensor(invalid),
                              .hidden = tensor(hidden),
                              .weight = tensor(weight),
                              .bias = tensor(bias),
                              .logits = tensor(logits),
                              .temperature = tensor(temperature),
                              .top_k = tensor(top_k),
                              .top_p = tensor(top_p),
                              .min_p = tensor(min_p),
                              .seed = tensor(seed),
                              .positions = tensor(positions),
                              .step = tensor(step),
                              .mask_id = mask_id,
                              .vocab_start = vocab_start,
                              .logit_softcap = logit_softcap,
                              .filter_order = filter_order,
                              .statistics = statistics};
  Backend::unmask_sample(tensor, args);
}

template <class Backend>
void unmask_select(py::handle tokens, py::handle transfer_index, py::handle num_masked,
                   py::handle num_transferred, py::handle done, py::handle proposed, py::handle confidence,
                   py::handle entropy, py::handle window_start, py::handle window_length,
                   py::handle num_select, py::handle threshold, py::handle factor, py::handle entropy_bound,
                   py::handle temperature, py::handle seed, py::handle step, py::handle editable,
                   py::handle edit_threshold, py::handle remask_threshold, int64_t mask_id) {
  Tensors tensor(Backend::kDeviceType);
  const UnmaskSelectArgs args{.tokens = tensor(tokens),
                              .transfer_index = tensor(transfer_index),
                              .num_masked = tensor(num_masked),
                              .num_transferred = tensor(num_transferred),
                              .done = tensor(done),
                              .proposed = tensor(proposed),
                              .confidence = tensor(confidence),
                              .entropy = tensor(entropy),
                              .window_start = tensor(window_start),
                              .window_length = tensor(window_length),
                              .num_select = tensor(num_select),
                              .threshold = tensor(threshold),
                              .factor = tensor(factor),
                              .entropy_bound = tensor(entropy_bound),
                              .temperature = tensor(temperature),
                              .seed = tensor(seed),
                              .step = tensor(step),
                              .editable = tensor(editable),
                              .edit_threshold = tensor(edit_threshold),
                              .remask_threshold = tensor(remask_threshold),
                              .mask_id = mask_id};
  Backend::unmask_select(tensor, args);
}

template <class Backend>
void masked_cross_entropy(py::handle lse, py::handle target_logit, py::handle hidden, py::handle weight,
                          py::handle bias, py::handle targets, int64_t mask_id, float logit_softcap) {
  Tensors tensor(Backend::kDeviceType);
  const MaskedCrossEntropyArgs args{.lse = tensor(lse),
                                    .target_logit = tensor(target_logit),
                                    .hidden = tensor(hidden),
                                    .weight = tensor(weight),
                                    .bias = tensor(bias),
                                    .targets = tensor(targets),
                                    .mask_id = mask_id,
                                    .logit_softcap = logit_softcap};
  Backend::masked_cross_entropy(tensor, args);
}

template <class Backend>
void masked_cross_entropy_backward(py::handle dlogits, py::handle hidden, py::handle weight, py::handle bias,
                                   py::handle targets, py::handle lse, py::handle grad, int64_t mask_id,
                                   float logit_softcap) {
  Tensors tensor(Backend::kDeviceType);
  const MaskedCrossEntropyBackwardArgs args{.dlogits = tensor(dlogits),
                                            .hidden = tensor(hidden),
                                            .weight = tensor(weight),
                                            .bias = tensor(bias),
                                            .targets = tensor(targets),
                                            .lse = tensor(lse),
                                            .grad = tensor(grad),
                                            .mask_id = mask_id,
                                            .logit_softcap = logit_softcap};
  Backend::masked_cross_entropy_backward(tensor, args);
}

template <class Backend>
void fused_linear(py::handle out, py::handle x, py::handle weight, py::handle bias, py::handle residual,
                  float normalize_eps, int64_t activation) {
  Tensors tensor(Backend::kDeviceType);
  const FusedLinearArgs args{.out = tensor(out),
                             .x = tensor(x),
                             .weight = tensor(weight),
                             .bias = tensor(bias),
                             .residual = tensor(residual),
                             .normalize_eps = normalize_eps,
                             .activation = activation};
  Backend::fused_linear(tensor, args);
}

template <class Backend>
void add_norm(py::handle out, py::handle sum, py::handle x, py::handle tokens, py::handle residual,
              py::handle weight, py::handle bias, float eps) {
  Tensors tensor(Backend::kDeviceType);
  const AddNormArgs args{.out = tensor(out),
                         .sum = tensor(sum),
                         .x = tensor(x),
                         .tokens = tensor(tokens),
                         .residual = tensor(residual),
                         .weight = tensor(weight),
                         .bias = tensor(bias),
                         .eps = eps};
  Backend::add_norm(tensor, args);
}

template <class Backend>
void bind_ops(py::module_& m) {
#define ESOKERN_BIND(name, Args) m.def(#name, &name<Backend>);
  ESOKERN_OPS(ESOKERN_BIND)
#undef ESOKERN_BIND
}

}  // namespace esokern::python
