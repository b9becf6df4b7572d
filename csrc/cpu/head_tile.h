// What an LM head does to a row of products hidden . weight, in place: logit = softcap(product + bias),
// softcap(x) = c tanh(x / c). One piece of code, so that every op sees the same bits of a logit.
#pragma once

#include "cpu/simd.h"

namespace esokern::cpu::ESOKERN_ISA {
namespace {

// tanh(x), relative error about 1e-7; NaN stays NaN.
ESOKERN_INLINE Vec tanh(Vec x) {
  const Vec z = x * x;
  Vec p = splat(-6.210893858e-3f);
  p = fma(p, z, splat(2.111650631e-2f));
  p = fma(p, z, splat(-5.389108136e-2f));
  p = fma(p, z, splat(1.333321184e-1f));
  p = fma(p, z, splat(-3.333333433e-1f));
  const Vec small = fma(x * z, p, x);
  const Vec magnitude = max(x, -x);
  const Vec large =
      splat(1.0f) - splat(2.0f) / (splat(1.0f) + exp(min(magnitude, splat(20.0f)) * splat(2.0f)));
  const Vec result = select(magnitude < splat(0.625f), small, select(x < splat(0.0f), -large, large));
  return select(x != x, x, result);
}

// bias: `count` values or null; softcap 0 = off. With a softcap, up to a whole Vec of `row` is rewritten.
template <class T>
inline void finish_logits(float* row, int64_t count, const T* bias, float softcap) {
  if (bias != nullptr) {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(row + i, load(row + i) + load(bias + i));
    for (; i < count; ++i) row[i] += to_float(bias[i]);
  }
  if (softcap > 0.0f)
    for (int64_t i = 0; i < count; i += kWidth)
      store(row + i, splat(softcap) * tanh(load(row + i) / splat(softcap)));
}

}  // namespace
}  // namespace esokern::cpu::ESOKERN_ISA
