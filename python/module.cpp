// esokern._cpu: one binding per op, in the order of its Args struct; no logic. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.h"
#include "dlpack.h"
#include "ops.h"

namespace py = pybind11;
using esokern::Tensor;
using esokern::python::to_tensor;

namespace {

void attention(py::handle out, py::handle lse, py::handle q, py::handle k, py::handle v,
               py::handle cu_seqlens_q, py::handle cu_seqlens_k, py::handle k_rank, py::handle prefix_end,
               py::handle window_start, py::handle window_end, float softmax_scale) {
  const esokern::AttentionArgs args{.out = to_tensor(out),
                                    .lse = to_tensor(lse),
                                    .q = to_tensor(q),
                                    .k = to_tensor(k),
                                    .v = to_tensor(v),
                                    .cu_seqlens_q = to_tensor(cu_seqlens_q),
                                    .cu_seqlens_k = to_tensor(cu_seqlens_k),
                                    .k_rank = to_tensor(k_rank),
                                    .prefix_end = to_tensor(prefix_end),
                                    .window_start = to_tensor(window_start),
                                    .window_end = to_tensor(window_end),
                                    .softmax_scale = softmax_scale};
  py::gil_scoped_release release;
  esokern::cpu::attention(args);
}

void attention_with_kvcache(py::handle out, py::handle lse, py::handle q, py::handle k_cache,
                            py::handle v_cache, py::handle k, py::handle v, py::handle cache_seqlens,
                            py::handle positions, py::handle rotary_cos, py::handle rotary_sin,
                            py::handle num_clean, py::handle slots, py::handle page_table,
                            py::handle cache_batch_idx, py::handle cu_seqlens_q, py::handle seqused_q,
                            py::handle k_rank, py::handle prefix_end, py::handle window_start,
                            py::handle window_end, int64_t chunk_mask, bool rotary_interleaved, bool commit,
                            float softmax_scale) {
  const esokern::AttentionWithKvcacheArgs args{.out = to_tensor(out),
                                               .lse = to_tensor(lse),
                                               .q = to_tensor(q),
                                               .k_cache = to_tensor(k_cache),
                                               .v_cache = to_tensor(v_cache),
                                               .k = to_tensor(k),
                                               .v = to_tensor(v),
                                               .cache_seqlens = to_tensor(cache_seqlens),
                                               .positions = to_tensor(positions),
                                               .rotary_cos = to_tensor(rotary_cos),
                                               .rotary_sin = to_tensor(rotary_sin),
                                               .num_clean = to_tensor(num_clean),
                                               .slots = to_tensor(slots),
                                               .page_table = to_tensor(page_table),
                                               .cache_batch_idx = to_tensor(cache_batch_idx),
                                               .cu_seqlens_q = to_tensor(cu_seqlens_q),
                                               .seqused_q = to_tensor(seqused_q),
                                               .k_rank = to_tensor(k_rank),
                                               .prefix_end = to_tensor(prefix_end),
                                               .window_start = to_tensor(window_start),
                                               .window_end = to_tensor(window_end),
                                               .chunk_mask = chunk_mask,
                                               .rotary_interleaved = rotary_interleaved,
                                               .commit = commit,
                                               .softmax_scale = softmax_scale};
  py::gil_scoped_release release;
  esokern::cpu::attention_with_kvcache(args);
}

void unmask_sample(py::handle tokens, py::handle logprob, py::handle prob, py::handle margin,
                   py::handle entropy, py::handle lse, py::handle score, py::handle invalid,
                   py::handle hidden, py::handle weight, py::handle bias, py::handle logits,
                   py::handle temperature, py::handle top_k, py::handle top_p, py::handle min_p,
                   py::handle seed, py::handle positions, py::handle step, int64_t mask_id,
                   int64_t vocab_start, float logit_softcap, int64_t filter_order, int64_t statistics) {
  const esokern::UnmaskSampleArgs args{.tokens = to_tensor(tokens),
                                       .logprob = to_tensor(logprob),
                                       .prob = to_tensor(prob),
                                       .margin = to_tensor(margin),
                                       .entropy = to_tensor(entropy),
                                       .lse = to_tensor(lse),
                                       .score = to_tensor(score),
                                       .invalid = to_tensor(invalid),
                                       .hidden = to_tensor(hidden),
                                       .weight = to_tensor(weight),
                                       .bias = to_tensor(bias),
                                       .logits = to_tensor(logits),
                                       .temperature = to_tensor(temperature),
                                       .top_k = to_tensor(top_k),
                                       .top_p = to_tensor(top_p),
                                       .min_p = to_tensor(min_p),
                                       .seed = to_tensor(seed),
                                       .positions = to_tensor(positions),
                                       .step = to_tensor(step),
                                       .mask_id = mask_id,
                                       .vocab_start = vocab_start,
                                       .logit_softcap = logit_softcap,
                                       .filter_order = filter_order,
                                       .statistics = statistics};
  py::gil_scoped_release release;
  esokern::cpu::unmask_sample(args);
}

void fused_linear(py::handle out, py::handle x, py::handle weight, py::handle bias, py::handle residual,
                  float normalize_eps, int64_t activation) {
  const esokern::FusedLinearArgs args{.out = to_tensor(out),
                                      .x = to_tensor(x),
                                      .weight = to_tensor(weight),
                                      .bias = to_tensor(bias),
                                      .residual = to_tensor(residual),
                                      .normalize_eps = normalize_eps,
                                      .activation = activation};
  py::gil_scoped_release release;
  esokern::cpu::fused_linear(args);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.def("attention", &attention);
  m.def("attention_with_kvcache", &attention_with_kvcache);
  m.def("unmask_sample", &unmask_sample);
  m.def("fused_linear", &fused_linear);
  m.def("built_isas", &esokern::cpu::built_isas);
  m.def("supported_isas", &esokern::cpu::supported_isas);
  m.def("get_isa", &esokern::cpu::get_isa);
  m.def("set_isa", &esokern::cpu::set_isa);
}
