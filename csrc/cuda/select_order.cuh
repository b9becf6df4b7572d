// Candidates in the order in which they are chosen: by falling key, equal keys by rising column.
#pragma once

#include "cuda/sample_state.cuh"

namespace esokern::cuda {
namespace {

constexpr float kNaN = __builtin_nanf("");

// Larger key, smaller integer; equal keys, -0 and +0 among them: by the column.
__device__ __forceinline__ uint64_t sortable(float key, uint64_t column) {
  return static_cast<uint64_t>(static_cast<uint32_t>(float_order(key + 0.0f)) ^ 0x7fffffffu) << 32 | column;
}
__device__ __forceinline__ int64_t column_of(uint64_t sortable_key) {
  return static_cast<int64_t>(sortable_key & 0xffffffffu);
}

// By a block: keys[0], ..., keys[count - 1] in ascending order. All comparators put the smaller key first (the first
// step of a merge compares mirror images), so larger keys beyond the last one would stay there and need not exist.
__device__ __forceinline__ void sort_keys(uint64_t* keys, uint32_t count) {
#pragma unroll 1
  for (uint32_t half = 1; half < count; half *= 2) {
#pragma unroll 1
    for (uint32_t stride = half; stride > 0; stride /= 2) {
      for (uint32_t pair = threadIdx.x;; pair += kRowThreads) {
        const uint32_t low = 2 * pair - (pair & (stride - 1));
        const uint32_t high = stride == half ? low ^ (2 * half - 1) : low + stride;
        if (low >= count) break;
        if (high >= count) continue;
        const uint64_t a = keys[low], b = keys[high];
        if (b < a) {
          keys[low] = b;
          keys[high] = a;
        }
      }
      block_sync();
    }
  }
}

// By a warp: how many of 0, 1, ..., count - 1 come before the first that does not pass.
template <class Passes>
__device__ __forceinline__ int64_t count_leading(int64_t count, const Passes& passes) {
  const int lane = threadIdx.x % kWarpSize;
  for (int64_t begin = 0;; begin += kWarpSize) {
    const bool stops = begin + lane >= count || !passes(begin + lane);
    const uint32_t stop = ballot(stops);
    if (stop != 0) return begin + count_bits((stop & (0u - stop)) - 1u);
  }
}

// By a warp: how many of the first entropies there are before their sum less the largest exceeds the bound.
template <class Entropy>
__device__ __forceinline__ int64_t count_bounded(int64_t count, double bound, const Entropy& entropy) {
  double sum = 0.0, largest = -__builtin_inf();
  int64_t bounded = 0;
  bool within = true;
  for (int64_t begin = threadIdx.x % kWarpSize; within; begin += kWarpSize) {
    const float mine = begin < count ? entropy(begin) : kNaN;  // which ends it
#pragma unroll 8
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const double next = static_cast<double>(shfl(mine, lane));
      sum += next;
      largest = next > largest ? next : largest;
      within = within && sum - largest <= bound;
      bounded += within ? 1 : 0;
    }
  }
  return bounded;
}

}  // namespace
}  // namespace esokern::cuda
