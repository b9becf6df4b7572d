// Which rows of a call there is work on: they become slots, so that the others cost nothing in the tiles.
#pragma once

#include "cuda/sample_state.cuh"

namespace esokern::cuda {
namespace {

constexpr int kListRounds = 8;  // groups of rows whose answers are under way at once
constexpr int kListCounts = kListRounds * kRowThreads / kWarpSize;

// By one block of kRowThreads: wanted(i) for every i < count, then visit(i, is wanted, slot) with slots 0, 1, 2, ... in
// the order of i. Returns how many are wanted. counts: kListCounts integers in shared memory.
template <class Wanted, class Visit>
__device__ __forceinline__ int32_t list_slots(int64_t count, int32_t* counts, const Wanted& wanted,
                                              const Visit& visit) {
  constexpr int kWarps = kRowThreads / kWarpSize;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int32_t slots = 0;
#pragma unroll 1
  for (int64_t begin = threadIdx.x; begin - threadIdx.x < count; begin += kListRounds * kRowThreads) {
    bool found[kListRounds];
    uint32_t lanes[kListRounds];
#pragma unroll
    for (int round = 0; round < kListRounds; ++round) {
      const int64_t i = begin + round * kRowThreads;
      found[round] = i < count && wanted(i);
    }
#pragma unroll
    for (int round = 0; round < kListRounds; ++round) {
      lanes[round] = ballot(found[round]);
      if (lane == 0) counts[round * kWarps + warp] = count_bits(lanes[round]);
    }
    block_sync();
#pragma unroll
    for (int round = 0; round < kListRounds; ++round) {
      const int64_t i = begin + round * kRowThreads;
      int32_t slot = slots + count_bits(lanes[round] & ((1u << lane) - 1u));
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp) slot += counts[round * kWarps + w];
        slots += counts[round * kWarps + w];
      }
      if (i < count) visit(i, found[round], slot);
    }
    block_sync();
  }
  return slots;
}

}  // namespace
}  // namespace esokern::cuda
