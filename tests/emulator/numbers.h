// The two half formats, as PTX converts them: round to nearest even, every NaN becomes 0x7FFF.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace esokern::emulator {

inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline float widen_bf16(uint16_t bits) {
  return bits_float(static_cast<uint32_t>(bits) << 16);
}
inline uint16_t narrow_bf16(float x) {
  const uint32_t bits = float_bits(x);
  if (x != x) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Exponents of f16 are moved to those of float32 by a multiplication, which normalises subnormals too.
inline float widen_f16(uint16_t bits) {
  const uint32_t magnitude = bits & 0x7FFFu, sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const float finite = bits_float(magnitude << 13) * 0x1p112f;
  const uint32_t value = magnitude >= 0x7C00u ? magnitude << 13 | 0x7F800000u : float_bits(finite);
  return bits_float(value | sign);
}
inline uint16_t narrow_f16(float x) {
  if (x != x) return 0x7FFF;
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7FFFFFFFu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (magnitude >= 0x47800000u) return sign | 0x7C00u;  // 65536 and more
  if (magnitude < 0x38800000u) {                        // subnormal: the addition rounds at 2^-24
    const float shifted = bits_float(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(float_bits(shifted) - float_bits(0.5f));
  }
  const uint32_t rounded = magnitude + 0xFFFu + (magnitude >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
}

// ex2.approx.ftz and lg2.approx.ftz, up to their last bits.
inline float flush(float x) {
  return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;
}
inline float exp2_ftz(float x) {
  return flush(::exp2f(flush(x)));
}
inline float log2_ftz(float x) {
  return ::log2f(flush(x));
}

}  // namespace esokern::emulator
