// top_k, top_p and min_p. Each keeps a prefix of a row's logits in descending order (equal logits: lower
// columns first), so all of them together are one threshold and the number of logits equal to it that are
// kept. Found without sorting by histograms over the order-preserving integer of a float, 11 + 11 + 10 bits
// from the top. Masses are summed in double: e^((x - max) / temperature), its argument rounded to float.
#pragma once

#include "cpu/sample_tile.h"

namespace esokern::cpu::ESOKERN_ISA {
namespace {

constexpr int kBins = 2048;
constexpr int64_t kAllTies = INT64_MAX;
constexpr uint32_t kLowestKey = 0x007fffff;  // order_key of -inf

struct Prefix {
  uint32_t key;  // of the last logit kept
  int64_t ties;  // how many equal to it
};

struct Histogram {
  double mass[kBins];
};

typedef double VecD __attribute__((vector_size(kWidth * 4)));
typedef float HalfVec __attribute__((vector_size(kWidth * 2)));
typedef int64_t VecL __attribute__((vector_size(kWidth * 4)));

// Larger float, larger key. -0 and +0 are equal.
ESOKERN_INLINE VecU order_key(Vec x) {
  const VecU bits = bitcast_uint(x + splat(0.0f));
  return bits ^ ((VecU)((VecI)bits >> 31) | splat(0x80000000u));
}
inline float from_key(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key ^ 0x80000000u : ~key;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// e^t for t <= 0, relative error about 1e-15; 0 below -700.
ESOKERN_INLINE VecD exp_double(VecD t) {
  const VecD low = -700.0 - VecD{};
  const VecD x = t < low ? low : t;
  const VecD rounder = 6755399441055744.0 - VecD{};  // 1.5 * 2^52
  const VecD shifted = x * 1.4426950408889634 + rounder;
  const VecD n = shifted - rounder;
  const VecD f = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  VecD p = 1.0 / 6227020800.0 - VecD{};
  const double inverse_factorial[] = {
      1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
      1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
#pragma GCC unroll 13
  for (int i = 0; i < 13; ++i) p = p * f + inverse_factorial[i];
  const VecL power = ((VecL)shifted - (VecL)rounder) << 52;
  const VecD result = (VecD)((VecL)p + power);
  return t < low ? VecD{} : result;
}

// Masses and keys of kWidth logits.
struct Candidates {
  const float* x;
  int64_t count;  // a multiple of kTile
  float top, temperature;
  bool by_mass;   // or by count
  Prefix within;  // candidates are this prefix only

  void block(int64_t i, uint32_t* keys, double* masses) const {
    const Vec v = load(x + i);
    store(keys, order_key(v));
    if (!by_mass) {
      for (int j = 0; j < kWidth; ++j) masses[j] = 1.0;
      return;
    }
    float t[kWidth];
    store(t, (v - splat(top)) / splat(temperature));
    for (int half = 0; half < 2; ++half) {
      HalfVec part;
      std::memcpy(&part, t + half * (kWidth / 2), sizeof part);
      const VecD e = exp_double(__builtin_convertvector(part, VecD));
      std::memcpy(masses + half * (kWidth / 2), &e, sizeof e);
    }
  }
};

// body(key, mass) for the candidates whose key matches in the bits of mask, in column order.
template <class Body>
inline void for_each(const Candidates& from, uint32_t pattern, uint32_t mask, const Body& body) {
  int64_t ties = from.within.ties;
  for (int64_t i = 0; i < from.count; i += kWidth) {
    const VecU key = order_key(load(from.x + i));
    const VecI match = ((key & splat(mask)) == splat(pattern)) & (key >= splat(from.within.key));
    if (!any(match)) continue;
    uint32_t keys[kWidth];
    double masses[kWidth];
    int32_t matches[kWidth];
    store(matches, match);
    from.block(i, keys, masses);
    for (int j = 0; j < kWidth; ++j) {
      if (matches[j] == 0) continue;
      if (keys[j] == from.within.key && ties-- <= 0) continue;
      body(keys[j], masses[j]);
    }
  }
}

// The shortest prefix of the candidates that holds `share` of their mass, at least one of them.
inline Prefix shortest_prefix(const Candidates& from, double share, bool share_is_absolute, Histogram* bins) {
  constexpr int kShift[3] = {21, 10, 0};
  constexpr int kWidthOf[3] = {2048, 2048, 1024};
  uint32_t pattern = 0, mask = 0;
  double before = 0.0, target = share, one = 0.0;
  for (int level = 0; level < 3; ++level) {
    for (int b = 0; b < kBins; ++b) bins->mass[b] = 0.0;
    const uint32_t low_bits = static_cast<uint32_t>(kWidthOf[level] - 1);
    for_each(from, pattern, mask, [&](uint32_t key, double mass) {
      bins->mass[(key >> kShift[level]) & low_bits] += mass;
      one = mass;
    });
    if (level == 0 && !share_is_absolute) {
      double total = 0.0;
      for (int b = kBins - 1; b >= 0; --b) total += bins->mass[b];
      target = share * total;
    }
    int chosen =
        -1;  // there is always one: the largest candidate has mass 1, and bins chosen before were not empty
    for (int b = kWidthOf[level] - 1; b >= 0; --b) {
      if (bins->mass[b] == 0.0) continue;
      if (chosen >= 0) before += bins->mass[chosen];
      chosen = b;
      if (before + bins->mass[b] >= target) break;
    }
    pattern |= static_cast<uint32_t>(chosen) << kShift[level];
    mask |= low_bits << kShift[level];
  }
  // All that is left has one key, hence one mass: count how many are needed.
  int64_t available = 0;
  for_each(from, pattern, mask, [&](uint32_t, double mass) {
    ++available;
    one = mass;
  });
  int64_t ties = 1;
  while (ties < available && before + static_cast<double>(ties) * one < target) ++ties;
  return {pattern, ties};
}

inline Prefix shorter(Prefix a, Prefix b) {
  if (a.key != b.key) return a.key > b.key ? a : b;
  return a.ties < b.ties ? a : b;
}

// Sets row->filtered, threshold and last_tie from the row's logits; x is -inf where there is no id.
inline void find_prefix(const float* x, int64_t count, int64_t top_k, float top_p, float min_p,
                        bool top_k_first, Histogram* bins, Row* row) {
  row->filtered = false;
  Vec largest = splat(-kInfinity);
  VecI good = splat(-1);
  for (int64_t i = 0; i < count; i += kWidth) {
    const Vec v = load(x + i);
    largest = max(largest, v);
    good &= v <= splat(kLargest);
  }
  const float top = fast_reduce_max(largest);
  if (any(~good) || !(top > -kInfinity)) return;  // an invalid row; the draw reports it
  const float temperature = row->temperature > 0.0f ? row->temperature : 1.0f;
  const Prefix everything = {kLowestKey, kAllTies};
  Prefix kept = everything;
  if (top_k > 0 && top_k < count)
    kept = shortest_prefix({x, count, top, temperature, false, everything}, static_cast<double>(top_k), true,
                           bins);
  if (top_p < 1.0f) {
    const Candidates from = {x, count, top, temperature, true, top_k_first ? kept : everything};
    kept = shorter(kept, shortest_prefix(from, static_cast<double>(top_p), false, bins));
  }
  if (min_p > 0.0f) {
    const float limit = static_cast<float>(log(static_cast<double>(min_p)));
    Vec least = splat(top);
    for (int64_t i = 0; i < count; i += kWidth) {
      const Vec v = load(x + i);
      least = min(least, (v - splat(top)) / splat(temperature) >= splat(limit) ? v : least);
    }
    uint32_t keys[kWidth];
    store(keys, order_key(-splat(fast_reduce_max(-least))));
    kept = shorter(kept, {keys[0], kAllTies});
  }
  row->filtered = true;
  row->threshold = from_key(kept.key);
  row->last_tie = INT32_MAX;
  if (kept.ties == kAllTies) return;
  int64_t ties = kept.ties;
  for (int64_t i = 0; i < count; i += kWidth) {
    if (!any(load(x + i) == splat(row->threshold))) continue;
    for (int j = 0; j < kWidth; ++j)
      if (x[i + j] == row->threshold && --ties == 0) {
        row->last_tie = static_cast<int32_t>(i + j);
        return;
      }
  }
}

}  // namespace
}  // namespace esokern::cpu::ESOKERN_ISA
