// top_k, top_p and min_p. Each keeps a prefix of a row's logits in descending order (equal logits: lower columns
//   first), so all of them together are one threshold and the last column of the logits equal to it that are kept.
// Work: a block per row. Found without sorting: four levels of a histogram over 8 bits each of the order-preserving
//   integer of a float, every level within the bin that the one before it chose.
// Memory: a row of float32 logits is read once per level (what it has beyond the L1 cache, from L2); 8 copies of a
//   histogram of 256 bins in shared memory, so that few lanes add to the same word.
// Masses are e^((x - max) / temperature), in double and then as integers of 62 bits for the whole row: sums do not
//   depend on the order in which threads add.
#pragma once

#include "cuda/sample_tile.cuh"

namespace esokern::cuda {
namespace {

constexpr int kFilterThreads = 256;
constexpr int kFilterWarps = kFilterThreads / kWarpSize;
constexpr int kBins = 256;
constexpr int kCopies = 8;
constexpr int64_t kAllTies = INT64_MAX;

template <class T>
struct PerRow {
  const T* data;  // null: `otherwise` for all rows
  int64_t stride;
  T otherwise;
  __device__ __forceinline__ T operator[](int64_t row) const {
    return data == nullptr ? otherwise : data[row * stride];
  }
};

struct Filters {
  PerRow<int32_t> top_k;
  PerRow<float> top_p, min_p;
  bool top_k_first;
};

struct Prefix {
  uint32_t key;  // of the last logit kept
  int64_t ties;  // how many equal to it
};

// Larger float, larger key. -0 and +0 are equal.
__device__ __forceinline__ uint32_t order_key(float x) {
  return static_cast<uint32_t>(float_order(x + 0.0f)) ^ 0x80000000u;
}
__device__ __forceinline__ float from_key(uint32_t key) {
  return float_of_order(static_cast<int32_t>(key ^ 0x80000000u));
}
__device__ __forceinline__ Prefix shorter(Prefix a, Prefix b) {
  if (a.key != b.key) return a.key > b.key ? a : b;
  return a.ties < b.ties ? a : b;
}
__device__ __forceinline__ int count_bits(uint32_t x) {
  x -= x >> 1 & 0x55555555u;
  x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
  return static_cast<int>(((x + (x >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24);
}

struct FilterSmem {
  int32_t low[kBins * kCopies], high[kBins * kCopies];  // halves of the bins
  uint64_t warp_mass[kFilterWarps];
  float warp_value[kFilterWarps];
  uint64_t before, mass;
  int32_t chosen;
};

// reduce over the block, the same value for all threads.
template <class Reduce>
__device__ __forceinline__ float reduce_block(float x, FilterSmem& smem, const Reduce& reduce) {
#pragma unroll
  for (int lanes = 1; lanes < kWarpSize; lanes *= 2) x = reduce(x, shfl_xor(x, lanes));
  block_sync();
  if (threadIdx.x % kWarpSize == 0) smem.warp_value[threadIdx.x / kWarpSize] = x;
  block_sync();
  x = smem.warp_value[0];
  for (int warp = 1; warp < kFilterWarps; ++warp) x = reduce(x, smem.warp_value[warp]);
  return x;
}

// body(logit) for all logits of a row, each by one thread.
template <class Body>
__device__ __forceinline__ void for_each_logit(const float* x, int64_t count, const Body& body) {
#pragma unroll 2
  for (int64_t i = 4 * threadIdx.x; i < count; i += 4 * kFilterThreads) {
    const Logits4 v = *reinterpret_cast<const Logits4*>(x + i);
#pragma unroll
    for (int c = 0; c < 4; ++c) body(v.value[c]);
  }
}

// What a prefix is sought among, and by what measure.
struct Candidates {
  const float* x;
  int64_t count;  // whole tiles
  float top, temperature;
  double unit;    // what the largest logit weighs; 0 = masses are counts
  Prefix within;  // candidates are this prefix only

  __device__ __forceinline__ uint64_t mass(float v) const {
    if (unit == 0.0) return 1;
    const float t = (v - top) / temperature;
    return t > -45.0f ? static_cast<uint64_t>(exp(static_cast<double>(t)) * unit) : 0;
  }
};

__device__ __forceinline__ void add_mass(FilterSmem& smem, int bin, uint64_t mass) {
  const int at = bin * kCopies + static_cast<int>(threadIdx.x % kCopies);
  const uint32_t low = static_cast<uint32_t>(mass);
  const uint32_t old = static_cast<uint32_t>(atomic_add(smem.low + at, static_cast<int32_t>(low)));
  const uint32_t high = static_cast<uint32_t>(mass >> 32) + (old + low < old ? 1u : 0u);
  if (high != 0) atomic_add(smem.high + at, static_cast<int32_t>(high));
}

// The shortest prefix of the candidates that holds `share` of their mass (or, by count, `share` of them), at least one
// of them. ties = kAllTies if it holds all that are equal to its last one. For all threads of the block.
__device__ __forceinline__ Prefix shortest_prefix(const Candidates& from, double share, FilterSmem& smem) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  uint32_t pattern = 0;
  uint64_t before = 0, mass = 0;
  double target = share;
#pragma unroll 1
  for (int shift = 24; shift >= 0; shift -= 8) {
    const uint32_t mask = shift == 24 ? 0u : ~0u << (shift + 8);
    block_sync();
    for (int i = threadIdx.x; i < kBins * kCopies; i += kFilterThreads) smem.low[i] = smem.high[i] = 0;
    if (threadIdx.x == 0) smem.chosen = -1;
    block_sync();
    const bool all = from.within.ties == kAllTies;
    for_each_logit(from.x, from.count, [&](float v) {
      const uint32_t key = order_key(v);
      if ((key & mask) != pattern || key < from.within.key || (!all && key == from.within.key)) return;
      const uint64_t m = from.mass(v);
      if (m != 0) add_mass(smem, key >> shift & 255u, m);
    });
    if (threadIdx.x == 0 && !all && (from.within.key & mask) == pattern)
      add_mass(smem, from.within.key >> shift & 255u,
               static_cast<uint64_t>(from.within.ties) * from.mass(from_key(from.within.key)));
    block_sync();
    // Thread i has the i-th bin from the top: `sum` is the mass down to it, its own included.
    const int bin = kBins - 1 - static_cast<int>(threadIdx.x);
    uint64_t own = 0;
    for (int copy = 0; copy < kCopies; ++copy)
      own += static_cast<uint32_t>(smem.low[bin * kCopies + copy]) +
             (static_cast<uint64_t>(static_cast<uint32_t>(smem.high[bin * kCopies + copy])) << 32);
    uint64_t sum = own;
#pragma unroll
    for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
      const uint64_t other = shfl(sum, lane - lanes < 0 ? 0 : lane - lanes);
      if (lane >= lanes) sum += other;
    }
    if (lane == kWarpSize - 1) smem.warp_mass[warp] = sum;
    block_sync();
    uint64_t total = 0, above = before;
    for (int w = 0; w < kFilterWarps; ++w) {
      if (w < warp) above += smem.warp_mass[w];
      total += smem.warp_mass[w];
    }
    sum += above;
    if (from.unit != 0.0 && shift == 24) target = share * static_cast<double>(total);
    // The first bin with which the target is reached; else the last one that is not empty.
    if (own != 0) atomic_max(&smem.chosen, static_cast<double>(sum) >= target ? kBins + bin : kBins - 1 - bin);
    block_sync();
    const int chosen = smem.chosen >= kBins ? smem.chosen - kBins : kBins - 1 - smem.chosen;
    if (bin == chosen) {
      smem.before = sum - own;
      smem.mass = own;
    }
    block_sync();
    before = smem.before;
    mass = smem.mass;
    pattern |= static_cast<uint32_t>(chosen) << shift;
  }
  // All that is left has one key, hence one mass: count how many are needed.
  const uint64_t one = from.mass(from_key(pattern));
  const int64_t available = static_cast<int64_t>(mass / one);
  const auto reached = [&](int64_t ties) {
    return static_cast<double>(before + static_cast<uint64_t>(ties) * one) >= target;
  };
  const double needed = ceil((target - static_cast<double>(before)) / static_cast<double>(one));
  int64_t ties = needed < 1.0                              ? 1
                 : needed < static_cast<double>(available) ? static_cast<int64_t>(needed)
                                                           : available;
  while (ties > 1 && reached(ties - 1)) --ties;
  while (ties < available && !reached(ties)) ++ties;
  const bool cut = ties < available || (pattern == from.within.key && from.within.ties != kAllTies);
  return {pattern, cut ? ties : kAllTies};
}

// Column of the `ties`-th logit equal to v, for the thread that owns it: body(column). There are at least so many.
template <class Body>
__device__ __forceinline__ void find_tie(const float* x, int64_t count, float v, int64_t ties, FilterSmem& smem,
                                const Body& body) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  // Each warp has a range of whole tiles; it counts there, and the one with the tie looks again.
  const int64_t tiles = count / kTile, begin = tiles * warp / kFilterWarps * kTile,
                end = tiles * (warp + 1) / kFilterWarps * kTile;
  const auto equal = [&](int64_t column, uint32_t (&lanes)[4]) {
    const Logits4 logits = *reinterpret_cast<const Logits4*>(x + column + 4 * lane);
    int found = 0;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      lanes[c] = ballot(logits.value[c] == v);
      found += count_bits(lanes[c]);
    }
    return found;
  };
  uint32_t lanes[4];
  int64_t mine = 0;
  for (int64_t column = begin; column < end; column += kTile) mine += equal(column, lanes);
  block_sync();
  if (lane == 0) smem.warp_mass[warp] = static_cast<uint64_t>(mine);
  block_sync();
  for (int w = 0; w < warp; ++w) ties -= static_cast<int64_t>(smem.warp_mass[w]);
  if (ties < 1 || ties > mine) return;
  for (int64_t column = begin; column < end; column += kTile) {
    const int found = equal(column, lanes);
    if (ties > found) {
      ties -= found;
      continue;
    }
    const uint32_t below = (1u << lane) - 1u;
    for (int c = 0; c < 4; ++c) ties -= count_bits(lanes[c] & below);
    for (int c = 0; c < 4; ++c)
      if ((lanes[c] >> lane & 1u) != 0 && --ties == 0) body(column + 4 * lane + c);
    return;
  }
}

// Sets threshold and last_tie of the rows with filters, from finished logits (-inf where there is no id).
__global__ void __launch_bounds__(kFilterThreads) find_prefix(SampleProblem p, Filters filters) {
  Arena arena;
  FilterSmem& smem = *arena.take<FilterSmem>(1);
  const int64_t slot = blockIdx.x;
  if (slot >= *p.count) return;
  const float* x = p.logits + slot * p.columns;
  const int64_t count = p.columns;
  float largest = -kInfinity;
  bool good = true;
  for_each_logit(x, count, [&](float v) {
    largest = fmaxf(largest, v);
    good = good && v <= kLargest;
  });
  const float top =
      reduce_block(good ? largest : kInfinity, smem, [](float a, float b) { return fmaxf(a, b); });
  if (!(top > -kInfinity && top <= kLargest)) return;  // an invalid row; the draw reports it

  const int32_t index = p.row_index[slot];
  const int64_t top_k = filters.top_k[index];
  const float top_p = filters.top_p[index], min_p = filters.min_p[index];
  const float row_temperature = p.rows[slot].temperature,
              temperature = row_temperature > 0.0f ? row_temperature : 1.0f;
  const Prefix everything = {order_key(-kInfinity), kAllTies};
  Prefix kept = everything;
  if (top_k > 0 && top_k < count)
    kept = shortest_prefix({x, count, top, temperature, 0.0, everything}, static_cast<double>(top_k), smem);
  if (top_p < 1.0f) {
    double unit = 0x1p62;  // so that all masses together fit
    for (int64_t room = 1; room < count; room *= 2) unit *= 0.5;
    const Prefix within = filters.top_k_first ? kept : everything;
    kept = shorter(
        kept, shortest_prefix({x, count, top, temperature, unit, within}, static_cast<double>(top_p), smem));
  }
  if (min_p > 0.0f) {
    const float limit = static_cast<float>(log(static_cast<double>(min_p)));
    float least = top;
    for_each_logit(x, count,
                   [&](float v) { least = (v - top) / temperature >= limit ? fminf(least, v) : least; });
    least = reduce_block(least, smem, [](float a, float b) { return fminf(a, b); });
    kept = shorter(kept, {order_key(least), kAllTies});
  }
  if (threadIdx.x == 0) p.rows[slot].threshold = from_key(kept.key);
  if (kept.ties != kAllTies)
    find_tie(x, count, from_key(kept.key), kept.ties, smem,
             [&](int64_t column) { p.rows[slot].last_tie = static_cast<int32_t>(column); });
}

}  // namespace
}  // namespace esokern::cuda
