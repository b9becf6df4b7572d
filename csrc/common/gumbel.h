// The Gumbel noise of a token, a pure function of (seed, position, step, global vocabulary id):
//   x = word (id & 3) of philox(counter = (id >> 2, position, step, 0), key = seed)
//   E = -log(1 - U), g = -log(E)
// with U = (x + 1/2) / 2^32, and 32 more bits (stream 1) below 2^-16, where the largest draws come from.
// Every operation is a separately rounded float32 multiplication or addition, so all back ends agree bit for
// bit; this file and esokern/philox.py are the two statements of it. No subnormal matters to any result.
#pragma once

#include <cstring>

#include "common/philox.h"

namespace esokern {
namespace {

// One stream. In CUDA add and mul are __fadd_rn and __fmul_rn; elsewhere contraction is switched off.
struct Scalar {
  using Float = float;
  using Uint = uint32_t;
  using Int = int32_t;
  ESOKERN_HD Float splat(float x) { return x; }
  ESOKERN_HD Uint splat(uint32_t x) { return x; }
  ESOKERN_HD Float add(Float a, Float b) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
  }
  ESOKERN_HD Float mul(Float a, Float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
  }
  ESOKERN_HD Float to_float(Uint x) { return static_cast<float>(x); }  // round to nearest even
  ESOKERN_HD Float to_float(Int x) { return static_cast<float>(x); }
  ESOKERN_HD Uint bits(Float x) {
    Uint out;
    memcpy(&out, &x, 4);
    return out;
  }
  ESOKERN_HD Float from_bits(Uint x) {
    Float out;
    memcpy(&out, &x, 4);
    return out;
  }
  ESOKERN_HD Int sign_shift(Uint x, int count) { return static_cast<Int>(x) >> count; }
  ESOKERN_HD Uint as_uint(Int x) { return static_cast<Uint>(x); }
  ESOKERN_HD bool any(bool mask) { return mask; }
  ESOKERN_HD void mul_hi_lo(Uint a, uint32_t b, Uint* hi, Uint* lo) {
    const uint64_t product = static_cast<uint64_t>(a) * b;
    *hi = static_cast<Uint>(product >> 32);
    *lo = static_cast<Uint>(product);
  }
};

}  // namespace

// log(2^e * (1 + f)) for f in [sqrt(1/2) - 1, sqrt(2) - 1]; relative error below 1.4e-7. The polynomial is a
// minimax fit of (log(1 + f) - f + f^2 / 2) / f^3; ln 2 is split so that e * 0.693359375 is exact.
template <class N>
ESOKERN_HD typename N::Float noise_log(typename N::Float e, typename N::Float f) {
  using Float = typename N::Float;
  Float p = N::splat(0x1.64a52ep-4f);
  p = N::add(N::mul(p, f), N::splat(-0x1.261742p-3f));
  p = N::add(N::mul(p, f), N::splat(0x1.3210cap-3f));
  p = N::add(N::mul(p, f), N::splat(-0x1.533fc0p-3f));
  p = N::add(N::mul(p, f), N::splat(0x1.98c456p-3f));
  p = N::add(N::mul(p, f), N::splat(-0x1.0004a2p-2f));
  p = N::add(N::mul(p, f), N::splat(0x1.55572ap-2f));
  const Float z = N::mul(f, f);
  Float y = N::mul(N::mul(z, f), p);
  y = N::add(y, N::mul(e, N::splat(-2.12194440e-4f)));
  y = N::add(y, N::mul(z, N::splat(-0.5f)));
  return N::add(N::add(f, y), N::mul(e, N::splat(0.693359375f)));
}

// x = 2^e * (1 + f) for a positive normal x.
template <class N>
ESOKERN_HD void noise_split(typename N::Float x, typename N::Float* e, typename N::Float* f) {
  const auto exponent = N::sign_shift(N::bits(x) - N::splat(0x3f3504f3u), 23);
  *e = N::to_float(exponent);
  *f = N::add(N::from_bits(N::bits(x) - (N::as_uint(exponent) << 23)), N::splat(-1.0f));
}

// x: word of stream 0; y: word of stream 1, which counts only where x < 2^16 (kTail = false: nowhere).
template <class N, bool kTail>
ESOKERN_HD typename N::Float gumbel(typename N::Uint x, typename N::Uint y) {
  using Float = typename N::Float;
  // Small U: log(1 - U) from f = -U keeps full relative precision. Large U: from V = 1 - U, exact in ~x.
  const auto small = x < N::splat(0x40000000u);
  Float t = N::mul(N::add(N::to_float(small ? x : ~x), N::splat(0.5f)), N::splat(0x1p-32f));
  if constexpr (kTail) {
    const Float refined = N::add(N::mul(N::to_float(x), N::splat(0x1p-32f)),
                                 N::mul(N::add(N::to_float(y), N::splat(0.5f)), N::splat(0x1p-64f)));
    t = x < N::splat(0x10000u) ? refined : t;
  }
  Float e, f;
  noise_split<N>(t, &e, &f);
  e = small ? N::splat(0.0f) : e;
  f = small ? -t : f;
  const Float exponential = -noise_log<N>(e, f);
  noise_split<N>(exponential, &e, &f);
  return -noise_log<N>(e, f);
}

template <class N>
struct Gumbel4 {
  typename N::Float value[4];
};

// The noise of four ids from their words x of stream 0, which belong to the other arguments.
template <class N>
ESOKERN_HD Gumbel4<N> gumbel4(const PhiloxWords<N>& x, typename N::Uint id_block, typename N::Uint position,
                              typename N::Uint step, typename N::Uint key0, typename N::Uint key1) {
  const auto limit = N::splat(0x10000u);
  Gumbel4<N> out;
  if (N::any((x.word[0] < limit) | (x.word[1] < limit) | (x.word[2] < limit) | (x.word[3] < limit))) {
    const PhiloxWords<N> y = philox4x32<N>(id_block, position, step, N::splat(1u), key0, key1);
    for (int i = 0; i < 4; ++i) out.value[i] = gumbel<N, true>(x.word[i], y.word[i]);
  } else {
    for (int i = 0; i < 4; ++i) out.value[i] = gumbel<N, false>(x.word[i], x.word[i]);
  }
  return out;
}

// The noise of the ids 4 * id_block + {0, 1, 2, 3}.
template <class N>
ESOKERN_HD Gumbel4<N> gumbel4(typename N::Uint id_block, typename N::Uint position, typename N::Uint step,
                              typename N::Uint key0, typename N::Uint key1) {
  const PhiloxWords<N> x = philox4x32<N>(id_block, position, step, N::splat(0u), key0, key1);
  return gumbel4<N>(x, id_block, position, step, key0, key1);
}

// The noise of a position that unmask_select may choose: words 0 and 1 of philox(0, position, step, 2) are x and y.
template <class N>
ESOKERN_HD typename N::Float selection_gumbel(typename N::Uint position, typename N::Uint step,
                                              typename N::Uint key0, typename N::Uint key1) {
  const PhiloxWords<N> words = philox4x32<N>(N::splat(0u), position, step, N::splat(2u), key0, key1);
  return gumbel<N, true>(words.word[0], words.word[1]);
}

// --- what need not be looked at. Noise is below -log U, for U < -log(1 - U).

// An id with a logit of at most `top` can only reach a score of `floor` if its U is below e^word_exponent; rounded
// generously to the safe side, at most 0.
ESOKERN_HD float word_exponent(float top, float floor, float temperature) {
  const float magnitude = (top < 0.0f ? -top : top) + (floor < 0.0f ? -floor : floor) + 64.0f * temperature;
  const float exponent = (top - floor + 1e-6f * magnitude) / temperature;
  return exponent < -47.0f ? -47.0f : exponent < 0.0f ? exponent : 0.0f;
}

// Hence ids whose Philox word is above the result cannot. power: e^exponent. 0 = none can: the largest noise is 45.05.
ESOKERN_HD uint32_t word_limit(float exponent, float power) {
  if (exponent >= -1e-3f) return UINT32_MAX;
  if (exponent < -46.0f) return 0;
  const float limit = power * 4.2992e9f;
  return limit < 65536.0f ? 65536u : limit < 4.29e9f ? static_cast<uint32_t>(limit) : UINT32_MAX;
}

}  // namespace esokern
