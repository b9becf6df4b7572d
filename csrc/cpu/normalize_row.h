// out = (x - mean) / sqrt(var + eps) * weight + bias of one row, in float; weight and bias may be null. Two passes for
// mean and variance, so that a large mean costs no digits.
#pragma once

#include <math.h>

#include "cpu/simd.h"

namespace esokern::cpu::ESOKERN_ISA {
namespace {

template <class In, class T>
inline void normalize_row(const In* x, int64_t depth, float eps, const T* weight, const T* bias, T* out) {
  const int64_t whole = depth / kWidth * kWidth;
  const int rest = static_cast<int>(depth - whole);
  const float scale = 1.0f / static_cast<float>(depth);
  Vec sum = {};
  for (int64_t d = 0; d < whole; d += kWidth) sum += load(x + d);
  if (rest > 0) sum += load_partial(x + whole, rest);
  const float mean = reduce_add(sum) * scale;
  Vec squares = {};
  for (int64_t d = 0; d < whole; d += kWidth) {
    const Vec difference = load(x + d) - splat(mean);
    squares = fma(difference, difference, squares);
  }
  float variance = reduce_add(squares);
  for (int64_t d = whole; d < depth; ++d) variance += (to_float(x[d]) - mean) * (to_float(x[d]) - mean);
  const float factor = 1.0f / sqrtf(variance * scale + eps);
  for (int64_t d = 0; d < whole; d += kWidth) {
    Vec v = (load(x + d) - splat(mean)) * splat(factor);
    if (weight != nullptr) v *= load(weight + d);
    if (bias != nullptr) v += load(bias + d);
    store_as(out + d, v);
  }
  for (int64_t d = whole; d < depth; ++d) {
    float v = (to_float(x[d]) - mean) * factor;
    if (weight != nullptr) v *= to_float(weight[d]);
    if (bias != nullptr) v += to_float(bias[d]);
    from_float(v, out + d);
  }
}

}  // namespace
}  // namespace esokern::cpu::ESOKERN_ISA
