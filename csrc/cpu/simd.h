// Vectors of native width. The only file with intrinsics. Loops over `Vec` compile for every instruction set;
// contraction is off, so a + b * c is two roundings everywhere and fma(b, c, a) is one where the machine has
// it.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "tensor.h"

namespace esokern::cpu::ESOKERN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t VecI __attribute__((vector_size(kWidth * 4)));
typedef uint32_t VecU __attribute__((vector_size(kWidth * 4)));

#define ESOKERN_INLINE static inline __attribute__((always_inline, unused))

ESOKERN_INLINE Vec splat(float x) {
  return x - Vec{};
}  // x - 0 keeps -0 and becomes one broadcast
ESOKERN_INLINE VecI splat(int32_t x) {
  return x - VecI{};
}
ESOKERN_INLINE VecU splat(uint32_t x) {
  return x - VecU{};
}

ESOKERN_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
ESOKERN_INLINE void store(float* p, Vec v) {
  std::memcpy(p, &v, sizeof v);
}
ESOKERN_INLINE VecI load(const int32_t* p) {
  VecI v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
ESOKERN_INLINE VecU load(const uint32_t* p) {
  VecU v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
ESOKERN_INLINE void store(int32_t* p, VecI v) {
  std::memcpy(p, &v, sizeof v);
}
ESOKERN_INLINE void store(uint32_t* p, VecU v) {
  std::memcpy(p, &v, sizeof v);
}

ESOKERN_INLINE Vec bitcast_float(VecU v) {
  return (Vec)v;
}
ESOKERN_INLINE VecU bitcast_uint(Vec v) {
  return (VecU)v;
}

// a * b + c in one rounding where the machine can, in two where it cannot.
ESOKERN_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// As the x86 instructions: if either operand is NaN the result is b.
ESOKERN_INLINE Vec max(Vec a, Vec b) {
  return a > b ? a : b;
}
ESOKERN_INLINE Vec min(Vec a, Vec b) {
  return a < b ? a : b;
}
ESOKERN_INLINE Vec select(VecI mask, Vec a, Vec b) {
  return mask ? a : b;
}

ESOKERN_INLINE float reduce_add(Vec v) {  // pairwise, the same tree in every call
  float lanes[kWidth];
  store(lanes, v);
  for (int width = kWidth / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}
ESOKERN_INLINE float reduce_max(Vec v) {
  float lanes[kWidth];
  store(lanes, v);
  float best = lanes[0];
  for (int i = 1; i < kWidth; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

// ---- half formats: storage only ---------------------------------------------------------------------------

ESOKERN_INLINE float to_float(float x) {
  return x;
}
ESOKERN_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
ESOKERN_INLINE float to_float(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {
    bits = 0x7f800000u | (magnitude & 0x3ffu) << 13;
  } else {
    // Shift into place and rescale by 2^112: exact for subnormals too.
    uint32_t shifted = magnitude << 13;
    float value;
    std::memcpy(&value, &shifted, 4);
    value *= 0x1p112f;
    std::memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

// Round to nearest even, NaN stays NaN.
ESOKERN_INLINE void from_float(float x, float* out) {
  *out = x;
}
ESOKERN_INLINE void from_float(float x, bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  out->bits = x != x ? uint16_t{0x7fc0} : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
ESOKERN_INLINE void from_float(float x, f16* out) {
#if defined(__F16C__)
  out->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) {
    out->bits = sign | 0x7e00u;
  } else if (bits >= 0x477ff000u) {  // rounds to 65536 or more
    out->bits = sign | 0x7c00u;
  } else if (bits < 0x38800000u) {  // subnormal or zero: let a float addition round at 2^-24
    float value;
    std::memcpy(&value, &bits, 4);
    value += 0.5f;
    std::memcpy(&bits, &value, 4);
    out->bits = sign | static_cast<uint16_t>(bits - 0x3f000000u);
  } else {
    bits += 0xfffu + ((bits >> 13) & 1u);
    out->bits = sign | static_cast<uint16_t>((bits - 0x38000000u) >> 13);
  }
#endif
}

// kWidth consecutive elements as floats, and back.
ESOKERN_INLINE Vec load(const bf16* p) {
  typedef uint16_t Half __attribute__((vector_size(kWidth * 2)));
  Half half;
  std::memcpy(&half, p, sizeof half);
  return (Vec)(__builtin_convertvector(half, VecU) << 16);
}
ESOKERN_INLINE Vec load(const f16* p) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(
      0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));  // maskz: see mul_hi_lo
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  float lanes[kWidth];
  for (int i = 0; i < kWidth; ++i) lanes[i] = to_float(p[i]);
  return load(lanes);
#endif
}
template <class T>
ESOKERN_INLINE void store_as(T* p, Vec v) {
  float lanes[kWidth];
  store(lanes, v);
  for (int i = 0; i < kWidth; ++i) from_float(lanes[i], p + i);
}
template <>
inline __attribute__((always_inline)) void store_as<float>(float* p, Vec v) {
  store(p, v);
}
template <>
inline __attribute__((always_inline)) void store_as<bf16>(bf16* p, Vec v) {
  typedef uint16_t Half __attribute__((vector_size(kWidth * 2)));
  const VecU bits = bitcast_uint(v);
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Half half = __builtin_convertvector(v != v ? splat(0x7fc0u) : rounded, Half);
  std::memcpy(p, &half, sizeof half);
}
#if defined(__AVX512F__)
template <>
inline __attribute__((always_inline)) void store_as<f16>(f16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
template <>
inline __attribute__((always_inline)) void store_as<f16>(f16* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#endif

// ---- pairs of bf16 in 32 bits: one instruction multiplies both and adds in float --------------------------

#if defined(__AVX512BF16__)
constexpr bool kBf16Pairs = true;

ESOKERN_INLINE Vec dot_pairs(VecU a, VecU b, Vec acc) {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}
ESOKERN_INLINE VecU round_to_bf16(Vec x) {
  return (VecU)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
}
#else
constexpr bool kBf16Pairs = false;

ESOKERN_INLINE Vec dot_pairs(VecU, VecU, Vec acc) {
  return acc;
}  // never called
ESOKERN_INLINE VecU round_to_bf16(Vec x) {
  return bitcast_uint(x) >> 16;
}
#endif

// kWidth consecutive values as their bits, each in the low half of 32.
ESOKERN_INLINE VecU load_bits(const bf16* p) {
  return bitcast_uint(load(p)) >> 16;
}
ESOKERN_INLINE void store_bits(bf16* p, VecU v) {
  typedef uint16_t Half __attribute__((vector_size(kWidth * 2)));
  const Half half = __builtin_convertvector(v, Half);
  std::memcpy(p, &half, sizeof half);
}

// ---- exp --------------------------------------------------------------------------------------------------

// 2^x for x <= 127; 0 below about -126 (so -inf gives 0). Relative error about 2e-7 (degree 6 on [-1/2,
// 1/2]).
ESOKERN_INLINE Vec exp2(Vec x) {
  const Vec clamped = max(x, splat(-126.0f));
  const Vec rounder = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec shifted = clamped + rounder;
  const Vec f = clamped - (shifted - rounder);
  Vec p = splat(1.5403530394e-4f);
  p = fma(p, f, splat(1.3333558146e-3f));
  p = fma(p, f, splat(9.6181291076e-3f));
  p = fma(p, f, splat(5.5504108665e-2f));
  p = fma(p, f, splat(2.4022650696e-1f));
  p = fma(p, f, splat(6.9314718056e-1f));
  p = fma(p, f, splat(1.0f));
  const VecU exponent = (bitcast_uint(shifted) - bitcast_uint(rounder)) << 23;
  const Vec result = bitcast_float(bitcast_uint(p) + exponent);
  return select(x < splat(-126.0f), splat(0.0f), result);
}
ESOKERN_INLINE Vec exp(Vec x) {
  return exp2(x * splat(1.4426950408889634f));
}

// ---- dot products -----------------------------------------------------------------------------------------

// The first count < kWidth elements, zeros behind them; reads nothing else.
template <class T>
ESOKERN_INLINE Vec load_partial(const T* p, int count) {
  T lanes[kWidth] = {};
  for (int i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}
#if defined(__AVX512F__)
template <>
inline __attribute__((always_inline)) Vec load_partial<float>(const float* p, int count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
#endif

// One step along the summed dimension: acc + a * b over kStep elements, always in the same order.
template <class T>
struct Dot {
  using Operand = Vec;
  static constexpr int kStep = kWidth;
  ESOKERN_INLINE Operand load(const T* p) { return ESOKERN_ISA::load(p); }
  ESOKERN_INLINE Operand load_partial(const T* p, int count) { return ESOKERN_ISA::load_partial(p, count); }
  ESOKERN_INLINE Vec multiply_add(Operand a, Operand b, Vec acc) { return fma(a, b, acc); }
};
#if defined(__AVX512BF16__)
template <>
struct Dot<bf16> {  // pairs of products, summed in float by the instruction
  using Operand = __m512i;
  static constexpr int kStep = 32;
  ESOKERN_INLINE Operand load(const bf16* p) { return _mm512_loadu_si512(p); }
  ESOKERN_INLINE Operand load_partial(const bf16* p, int count) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << count) - 1), p);
  }
  ESOKERN_INLINE Vec multiply_add(Operand a, Operand b, Vec acc) {
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
  }
};
#endif

template <int kHalf>
ESOKERN_INLINE void fold_pairs(
    Vec* v) {  // lanes with bit kHalf clear: sums of v[i]; set: sums of v[i + kHalf]
  VecI stay = {}, cross = {};
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    stay[i] = i & kHalf ? kWidth + i : i;  // a blend, cheaper than a shuffle
    cross[i] = i & kHalf ? kWidth + (i ^ kHalf) : i | kHalf;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kHalf; ++i)
    v[i] = __builtin_shuffle(v[i], v[i + kHalf], stay) + __builtin_shuffle(v[i], v[i + kHalf], cross);
}

// Lane i of the result is the sum over the lanes of v[i], i < kWidth, by the tree of reduce_add. Overwrites v.
ESOKERN_INLINE Vec reduce_add_each(Vec* v) {
  if constexpr (kWidth >= 16) fold_pairs<8>(v);
  if constexpr (kWidth >= 8) fold_pairs<4>(v);
  fold_pairs<2>(v);
  fold_pairs<1>(v);
  return v[0];
}

ESOKERN_INLINE void prefetch(const void* p) {
  __builtin_prefetch(p, 0, 2);
}

// ---- integers ---------------------------------------------------------------------------------------------

ESOKERN_INLINE bool any(VecI mask) {  // mask: lanes all ones or all zeros
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  int32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= mask[i];
  return bits != 0;
#endif
}

// uint32 -> float, round to nearest even: the two halves are exact and their sum rounds once.
ESOKERN_INLINE Vec convert_float(VecU x) {
#if defined(__AVX512F__)
  return __builtin_convertvector(x, Vec);
#else
  return __builtin_convertvector((VecI)(x >> 16), Vec) * 65536.0f +
         __builtin_convertvector((VecI)(x & 0xffffu), Vec);
#endif
}
ESOKERN_INLINE Vec convert_float(VecI x) {
  return __builtin_convertvector(x, Vec);
}

// The 64-bit product of every lane of a with b.
ESOKERN_INLINE void mul_hi_lo(VecU a, uint32_t b, VecU* hi, VecU* lo) {
#if defined(__AVX512F__)  // maskz forms: the plain ones warn about their undefined operand in GCC 12
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_maskz_mul_epu32(0xff, (__m512i)a, factor);
  const __m512i odd = _mm512_maskz_mul_epu32(0xff, _mm512_maskz_srli_epi64(0xff, (__m512i)a, 32), factor);
  *hi = (VecU)_mm512_mask_shuffle_epi32(odd, 0x5555, even, static_cast<_MM_PERM_ENUM>(0xf5));
  *lo = a * splat(b);
#elif defined(__AVX2__)
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(b));
  const __m256i even = _mm256_mul_epu32((__m256i)a, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
  *hi = (VecU)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  *lo = (VecU)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
  for (int i = 0; i < kWidth; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * b;
    (*hi)[i] = static_cast<uint32_t>(product >> 32);
    (*lo)[i] = static_cast<uint32_t>(product);
  }
#endif
}

// The number type of common/philox.h and common/gumbel.h with one stream per lane.
struct NoiseVec {
  using Float = Vec;
  using Uint = VecU;
  using Int = VecI;
  ESOKERN_INLINE Float splat(float x) { return ESOKERN_ISA::splat(x); }
  ESOKERN_INLINE Uint splat(uint32_t x) { return ESOKERN_ISA::splat(x); }
  ESOKERN_INLINE Float add(Float a, Float b) { return a + b; }
  ESOKERN_INLINE Float mul(Float a, Float b) { return a * b; }
  ESOKERN_INLINE Float to_float(Uint x) { return convert_float(x); }
  ESOKERN_INLINE Float to_float(Int x) { return convert_float(x); }
  ESOKERN_INLINE Uint bits(Float x) { return bitcast_uint(x); }
  ESOKERN_INLINE Float from_bits(Uint x) { return bitcast_float(x); }
  ESOKERN_INLINE Int sign_shift(Uint x, int count) { return (VecI)x >> count; }
  ESOKERN_INLINE Uint as_uint(Int x) { return (VecU)x; }
  ESOKERN_INLINE bool any(VecI mask) { return ESOKERN_ISA::any(mask); }
  ESOKERN_INLINE void mul_hi_lo(Uint a, uint32_t b, Uint* hi, Uint* lo) {
    ESOKERN_ISA::mul_hi_lo(a, b, hi, lo);
  }
};

}  // namespace
}  // namespace esokern::cpu::ESOKERN_ISA
