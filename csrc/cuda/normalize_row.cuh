// sum = residual + x, where x may be gathered rows of a table; out = normalize(sum) * weight + bias,
//   normalize(s) = (s - mean) / sqrt(var + eps) over the row, of the sum as it is stored.
// Work: a row is one warp's, or a block's where it is long. A thread owns the same vectors of 16 bytes of its row in all
//   passes, which is why an output may be an input itself.
// Memory: the row stays in registers, up to kHeldVectors vectors per thread; what is longer is read again by the passes
//   for variance and out. Two passes for mean and variance, so that a large mean costs no digits.
// Limits: any row length and alignment; rows that do not begin at 16 bytes are read and written element by element.
#pragma once

#include <math.h>
#include <string.h>

#include "cuda/device.cuh"
#include "cuda/dispatch.h"

namespace esokern::cuda {
namespace {

constexpr int kHeldVectors = 4;
constexpr int kLongRowWarps = 8;
constexpr int kShortRowsPerBlock = 4;

template <class T>
struct RowsProblem {
  T* out;
  T* sum;  // may be null, as may tokens, residual, weight and bias
  const T* x;
  const int64_t* tokens;
  const T* residual;
  const T* weight;
  const T* bias;
  int64_t ld_out, ld_sum, ld_x, ld_tokens, ld_residual;  // in elements
  int64_t rows, hidden, vocab;
  float eps;
};

// A vector: 16 bytes of T, in registers as floats.
template <class T>
constexpr int kVectorSize = 16 / sizeof(T);
template <class T>
using Vector = float[kVectorSize<T>];

// Elements [begin, end) of a row, at most a vector; where kAligned it is a whole one.
template <bool kAligned, class T>
__device__ __forceinline__ void load_vector(const T* row, int64_t begin, int64_t end, Vector<T>& v) {
  T element[kVectorSize<T>];
  if constexpr (kAligned) {
    const Bytes16 bytes = load_16(row + begin);
    memcpy(element, &bytes, 16);
  }
#pragma unroll
  for (int j = 0; j < kVectorSize<T>; ++j) {
    if constexpr (!kAligned) element[j] = begin + j < end ? row[begin + j] : from_float<T>(0.0f);
    v[j] = to_float(element[j]);
  }
}
template <bool kAligned, class T>
__device__ __forceinline__ void store_vector(T* row, int64_t begin, int64_t end, const Vector<T>& v) {
  T element[kVectorSize<T>];
#pragma unroll
  for (int j = 0; j < kVectorSize<T>; ++j) {
    element[j] = from_float<T>(v[j]);
    if constexpr (!kAligned)
      if (begin + j < end) row[begin + j] = element[j];
  }
  if constexpr (kAligned) {
    Bytes16 bytes;
    memcpy(&bytes, element, 16);
    store_16(row + begin, bytes);
  }
}

// The sum over the threads of a row, the same bits in all of them. partial: kWarps floats of its own for each call.
template <int kWarps>
__device__ __forceinline__ float reduce_row(float value, float* partial) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += shfl_xor(value, mask);
  if constexpr (kWarps > 1) {
    if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = value;
    block_sync();
    value = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) value += partial[warp];
  }
  return value;
}

template <class T, int kWarps, bool kAligned>
__global__ void __launch_bounds__(kWarpSize*(kWarps == 1 ? kShortRowsPerBlock : kWarps))
    normalize_rows_kernel(RowsProblem<T> p) {
  constexpr int kThreads = kWarps * kWarpSize;
  constexpr int kSize = kVectorSize<T>;
  constexpr int kStride = kThreads * kSize;  // from one vector of a thread to its next
  const int64_t block = static_cast<int64_t>(blockIdx.x);
  const int64_t row = kWarps == 1 ? block * kShortRowsPerBlock + threadIdx.x / kWarpSize : block;
  if (row >= p.rows) return;  // a whole warp, or nobody
  const int first = static_cast<int>(threadIdx.x % kThreads) * kSize;

  const int64_t from = p.tokens == nullptr ? row : p.tokens[row * p.ld_tokens];
  const bool exists = p.tokens == nullptr || (from >= 0 && from < p.vocab);
  const T* x = p.x + (exists ? from : 0) * p.ld_x;
  const T* residual = p.residual == nullptr ? nullptr : p.residual + row * p.ld_residual;
  T* sum = p.sum == nullptr ? nullptr : p.sum + row * p.ld_sum;
  T* out = p.out + row * p.ld_out;

  const auto add = [&](int64_t at, Vector<T>& v) {
    if (exists) {
      load_vector<kAligned>(x, at, p.hidden, v);
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) v[j] = NAN;
    }
    if (residual == nullptr) return;
    Vector<T> other;
    load_vector<kAligned>(residual, at, p.hidden, other);
#pragma unroll
    for (int j = 0; j < kSize; ++j) v[j] = to_float(from_float<T>(other[j] + v[j]));
  };
  const auto total = [&](const Vector<T>& v) {  // what lies beyond the row is 0
    float result = 0.0f;
#pragma unroll
    for (int j = 0; j < kSize; ++j) result += v[j];
    return result;
  };

  // Loads first, stores after them: an output that may be an input would keep the next load waiting.
  float held[kHeldVectors][kSize] = {};
#pragma unroll
  for (int i = 0; i < kHeldVectors; ++i)
    if (first + i * kStride < p.hidden) add(first + i * kStride, held[i]);
  float sums = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeldVectors; ++i) {
    sums += total(held[i]);
    if (sum != nullptr && first + i * kStride < p.hidden)
      store_vector<kAligned>(sum, first + i * kStride, p.hidden, held[i]);
  }
  const int64_t rest = first + kHeldVectors * kStride;
  for (int64_t at = rest; at < p.hidden; at += kStride) {
    Vector<T> v;
    add(at, v);
    sums += total(v);
    if (sum != nullptr) store_vector<kAligned>(sum, at, p.hidden, v);
  }
  const auto again = [&](int64_t at, Vector<T>& v) {
    if (sum != nullptr)
      load_vector<kAligned>(sum, at, p.hidden, v);
    else
      add(at, v);
  };

  float* partial = nullptr;
  if constexpr (kWarps > 1) {
    Arena arena;
    partial = arena.take<float>(2 * kWarps);
  }
  const float scale = 1.0f / static_cast<float>(p.hidden);
  const float mean = reduce_row<kWarps>(sums, partial) * scale;

  const auto deviation = [&](int64_t at, const Vector<T>& v) {
    float result = 0.0f;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float difference = kAligned || at + j < p.hidden ? v[j] - mean : 0.0f;
      result = fmaf(difference, difference, result);
    }
    return result;
  };
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeldVectors; ++i)
    if (first + i * kStride < p.hidden) squares += deviation(first + i * kStride, held[i]);
  for (int64_t at = rest; at < p.hidden; at += kStride) {
    Vector<T> v;
    again(at, v);
    squares += deviation(at, v);
  }
  const float factor = 1.0f / sqrtf(reduce_row<kWarps>(squares, partial + kWarps) * scale + p.eps);

  const auto normalize = [&](int64_t at, Vector<T>& v) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) v[j] = (v[j] - mean) * factor;
    Vector<T> other;
    if (p.weight != nullptr) {
      load_vector<kAligned>(p.weight, at, p.hidden, other);
#pragma unroll
      for (int j = 0; j < kSize; ++j) v[j] *= other[j];
    }
    if (p.bias != nullptr) {
      load_vector<kAligned>(p.bias, at, p.hidden, other);
#pragma unroll
      for (int j = 0; j < kSize; ++j) v[j] += other[j];
    }
  };
#pragma unroll
  for (int i = 0; i < kHeldVectors; ++i)
    if (first + i * kStride < p.hidden) normalize(first + i * kStride, held[i]);
#pragma unroll
  for (int i = 0; i < kHeldVectors; ++i)
    if (first + i * kStride < p.hidden) store_vector<kAligned>(out, first + i * kStride, p.hidden, held[i]);
  for (int64_t at = rest; at < p.hidden; at += kStride) {
    Vector<T> v;
    again(at, v);
    normalize(at, v);
    store_vector<kAligned>(out, at, p.hidden, v);
  }
}

// Whether every row begins at 16 bytes. A single row has no stride.
template <class T>
bool aligned_rows(const T* data, int64_t stride, int64_t rows) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (rows <= 1 || stride % kVectorSize<T> == 0);
}

template <class T, bool kAligned>
void launch_rows(const RowsProblem<T>& p, void* stream) {
  if (p.hidden <= kHeldVectors * kWarpSize * kVectorSize<T>) {
    const Grid grid{(p.rows + kShortRowsPerBlock - 1) / kShortRowsPerBlock};
    launch("normalize_rows", normalize_rows_kernel<T, 1, kAligned>, grid, kWarpSize * kShortRowsPerBlock, 0,
           stream, p);
  } else {
    ArenaSize shared;
    shared.take<float>(2 * kLongRowWarps);
    launch("normalize_rows", normalize_rows_kernel<T, kLongRowWarps, kAligned>, Grid{p.rows},
           kWarpSize * kLongRowWarps, shared.bytes(), stream, p);
  }
}

template <class T>
void normalize_rows(const RowsProblem<T>& p, void* stream) {
  const bool aligned = p.hidden % kVectorSize<T> == 0 && aligned_rows(p.out, p.ld_out, p.rows) &&
                       aligned_rows(p.sum, p.ld_sum, p.rows) &&
                       aligned_rows(p.residual, p.ld_residual, p.rows) &&
                       aligned_rows(p.x, p.ld_x, p.tokens == nullptr ? p.rows : p.vocab) &&
                       aligned_rows(p.weight, 0, 1) && aligned_rows(p.bias, 0, 1);
  if (aligned)
    launch_rows<T, true>(p, stream);
  else
    launch_rows<T, false>(p, stream);
}

}  // namespace
}  // namespace esokern::cuda
