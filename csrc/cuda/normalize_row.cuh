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

// 16 bytes of a row: as it is stored, and as floats.
template <class T>
constexpr int kVectorSize = 16 / sizeof(T);
template <class T>
struct alignas(16) Stored {
  T element[kVectorSize<T>];
};
template <class T>
using Vector = float[kVectorSize<T>];

// Elements [begin, end) of a row, at most a vector, and zeros for what is missing. kAligned: a whole one or none.
template <bool kAligned, class T>
__device__ __forceinline__ Stored<T> load_vector(const T* row, int64_t begin, int64_t end) {
  Stored<T> v = {};
  if constexpr (kAligned) {
    Bytes16 bytes = {};
    if (begin < end) bytes = load_16(row + begin);
    memcpy(&v, &bytes, sizeof v);
  } else {
#pragma unroll
    for (int j = 0; j < kVectorSize<T>; ++j)
      if (begin + j < end) v.element[j] = row[begin + j];
  }
  return v;
}
template <bool kAligned, class T>
__device__ __forceinline__ void store_vector(T* row, int64_t begin, int64_t end, const Vector<T>& v) {
  Stored<T> stored;
#pragma unroll
  for (int j = 0; j < kVectorSize<T>; ++j) stored.element[j] = from_float<T>(v[j]);
  if constexpr (kAligned) {
    Bytes16 bytes;
    memcpy(&bytes, &stored, sizeof bytes);
    if (begin < end) store_16(row + begin, bytes);
  } else {
#pragma unroll
    for (int j = 0; j < kVectorSize<T>; ++j)
      if (begin + j < end) row[begin + j] = stored.element[j];
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

  const auto load = [&](const T* whole_row, int64_t at) {
    return load_vector<kAligned>(whole_row, at, p.hidden);
  };
  const auto add = [&](const Stored<T>& mine, const Stored<T>& other, Vector<T>& v) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      v[j] = exists ? to_float(mine.element[j]) : NAN;
      if (residual != nullptr) v[j] = to_float(from_float<T>(to_float(other.element[j]) + v[j]));
    }
  };
  const auto total = [&](const Vector<T>& v) {
    float result = 0.0f;
#pragma unroll
    for (int j = 0; j < kSize; ++j) result += v[j];
    return result;
  };
  const auto deviation = [&](int64_t at, float mean, const Vector<T>& v) {
    float result = 0.0f;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float difference = at + (kAligned ? 0 : j) < p.hidden ? v[j] - mean : 0.0f;
      result = fmaf(difference, difference, result);
    }
    return result;
  };
  const auto normalize = [&](float mean, float factor, const Stored<T>& weight, const Stored<T>& bias,
                             Vector<T>& v) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      v[j] = (v[j] - mean) * factor;
      if (p.weight != nullptr) v[j] *= to_float(weight.element[j]);
      if (p.bias != nullptr) v[j] += to_float(bias.element[j]);
    }
  };

  // The loads of all held vectors go first: they wait together, and for no store that might have changed them.
  Vector<T> held[kHeldVectors];
  Stored<T> ours[kHeldVectors] = {}, others[kHeldVectors] = {};
  if (exists) {
#pragma unroll
    for (int i = 0; i < kHeldVectors; ++i) ours[i] = load(x, first + i * kStride);
  }
  if (residual != nullptr) {
#pragma unroll
    for (int i = 0; i < kHeldVectors; ++i) others[i] = load(residual, first + i * kStride);
  }
  float sums = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeldVectors; ++i) {
    add(ours[i], others[i], held[i]);
    sums += total(held[i]);
  }
  if (sum != nullptr) {
#pragma unroll
    for (int i = 0; i < kHeldVectors; ++i)
      store_vector<kAligned>(sum, first + i * kStride, p.hidden, held[i]);
  }
  const int64_t rest = first + kHeldVectors * kStride;
  const auto add_rest = [&](int64_t at, Vector<T>& v) {
    add(exists ? load(x, at) : Stored<T>{}, residual != nullptr ? load(residual, at) : Stored<T>{}, v);
  };
  for (int64_t at = rest; at < p.hidden; at += kStride) {
    Vector<T> v;
    add_rest(at, v);
    sums += total(v);
    if (sum != nullptr) store_vector<kAligned>(sum, at, p.hidden, v);
  }
  const auto again = [&](int64_t at, Vector<T>& v) {
    if (sum == nullptr) return add_rest(at, v);
    const Stored<T> stored = load(sum, at);
#pragma unroll
    for (int j = 0; j < kSize; ++j) v[j] = to_float(stored.element[j]);
  };

  float* partial = nullptr;
  if constexpr (kWarps > 1) {
    Arena arena;
    partial = arena.take<float>(2 * kWarps);
  }
  const float scale = 1.0f / static_cast<float>(p.hidden);
  const float mean = reduce_row<kWarps>(sums, partial) * scale;
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeldVectors; ++i) squares += deviation(first + i * kStride, mean, held[i]);
  for (int64_t at = rest; at < p.hidden; at += kStride) {
    Vector<T> v;
    again(at, v);
    squares += deviation(at, mean, v);
  }
  const float factor = 1.0f / sqrtf(reduce_row<kWarps>(squares, partial + kWarps) * scale + p.eps);

  Stored<T> weights[kHeldVectors] = {}, biases[kHeldVectors] = {};
  if (p.weight != nullptr) {
#pragma unroll
    for (int i = 0; i < kHeldVectors; ++i) weights[i] = load(p.weight, first + i * kStride);
  }
  if (p.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < kHeldVectors; ++i) biases[i] = load(p.bias, first + i * kStride);
  }
#pragma unroll
  for (int i = 0; i < kHeldVectors; ++i) {
    normalize(mean, factor, weights[i], biases[i], held[i]);
    store_vector<kAligned>(out, first + i * kStride, p.hidden, held[i]);
  }
  for (int64_t at = rest; at < p.hidden; at += kStride) {
    Vector<T> v;
    again(at, v);
    normalize(mean, factor, p.weight != nullptr ? load(p.weight, at) : Stored<T>{},
              p.bias != nullptr ? load(p.bias, at) : Stored<T>{}, v);
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
