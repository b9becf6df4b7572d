// top_k, top_p and min_p. Each keeps a prefix of a row's logits in descending order (equal logits: lower columns
//   first), so all of them together are one threshold and the last column of the logits equal to it that are kept.
// Work: found without sorting: four levels of a histogram over 8 bits each of the order-preserving integer of a float,
//   every level within the bin that the one before it chose. A level is a kernel, its blocks take parts of rows and
//   find the bin chosen before for themselves; a last kernel with a block per row makes threshold and last column.
// Memory: a row of float32 logits is read once per level, from L2; 8 copies of a histogram of 256 bins in shared
//   memory, so that few lanes add to the same word; 6 KB per row for the rows' own histograms.
// Masses are e^((x - max) / temperature), in double and then as integers of 62 bits for the whole row: sums do not
//   depend on the order in which threads and blocks add.
#pragma once

#include "cuda/per_row.cuh"
#include "cuda/sample_tile.cuh"

namespace esokern::cuda {
namespace {

constexpr int kFilterThreads = 256;
constexpr int kFilterWarps = kFilterThreads / kWarpSize;
constexpr int kBins = 256;
constexpr int kCopies = 8;
constexpr int64_t kPart = 8192;  // columns of a block
constexpr int64_t kAllTies = INT64_MAX;

struct Filters {
  PerRow<int32_t> top_k;
  PerRow<float> top_p, min_p;
  bool top_k_first;

  // Steps of the search: four for top_k, then four for top_p, as far as they are given.
  __host__ __device__ int steps() const {
    return (top_k.data != nullptr ? 4 : 0) + (top_p.data != nullptr ? 4 : 0);
  }
  __device__ __forceinline__ bool by_mass(int step) const { return top_k.data == nullptr || step >= 4; }
};

struct Prefix {
  uint32_t key;  // of the last logit kept
  int64_t ties;  // how many equal to it
};

// What the steps before have found of a row.
struct Search {
  Prefix kept;
  uint64_t before;   // mass above the bin chosen last
  double target;     // mass to reach
  uint32_t pattern;  // of the keys in that bin
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

struct FilterSmem {
  int32_t low[kBins * kCopies], high[kBins * kCopies];  // halves of the bins
  uint64_t warp_mass[kFilterWarps];
  float warp_value[kFilterWarps];
  uint64_t before, mass;
  int32_t chosen;
};

// Histograms of the rows: [slot][3 steps in turn][halves][kBins].
__device__ __forceinline__ int32_t* row_bins(const SampleProblem& p, int64_t slot, int step) {
  return p.bins + (slot * 3 + step % 3) * 2 * kBins;
}

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

// body(logit) for the logits of columns [begin, end), each by one thread.
template <class Body>
__device__ __forceinline__ void for_each_logit(const float* x, int64_t begin, int64_t end, const Body& body) {
#pragma unroll 4
  for (int64_t i = begin + 4 * threadIdx.x; i < end; i += 4 * kFilterThreads) {
    const Float4 v = *reinterpret_cast<const Float4*>(x + i);
#pragma unroll
    for (int c = 0; c < 4; ++c) body(v.value[c]);
  }
}

// What a prefix is sought among, and by what measure.
struct Candidates {
  bool wanted;  // by this row
  float top, temperature;
  double share;   // of the mass, or a count
  double unit;    // what the largest logit weighs; 0 = masses are counts
  Prefix within;  // candidates are this prefix only

  __device__ __forceinline__ uint64_t mass(float v) const {
    if (unit == 0.0) return 1;
    const float t = (v - top) / temperature;
    return t > -45.0f ? static_cast<uint64_t>(exp(static_cast<double>(t)) * unit) : 0;
  }
};

__device__ __forceinline__ Prefix everything() {
  return {order_key(-kInfinity), kAllTies};
}

__device__ __forceinline__ Candidates make_candidates(const SampleProblem& p, const Filters& filters,
                                                      int64_t slot, bool by_mass, Prefix kept) {
  const int32_t row = p.row_index[slot];
  const float temperature = p.rows[slot].temperature;
  Candidates c = {
      false, float_of_order(p.tops[slot]), temperature > 0.0f ? temperature : 1.0f, 0.0, 0.0, everything()};
  if (by_mass) {
    const float top_p = filters.top_p[row];
    c.wanted = top_p < 1.0f;
    c.share = static_cast<double>(top_p);
    c.unit = 0x1p62;  // so that all masses together fit
    for (int64_t room = 1; room < p.columns; room *= 2) c.unit *= 0.5;
    if (filters.top_k_first) c.within = kept;
  } else {
    const int32_t top_k = filters.top_k[row];
    c.wanted = top_k > 0 && top_k < p.columns;
    c.share = static_cast<double>(top_k);
  }
  return c;
}

// 64-bit addition as two of 32 bits: whoever makes the low half overflow adds the carry.
__device__ __forceinline__ void add_mass(int32_t* low, int32_t* high, uint64_t mass) {
  const uint32_t part = static_cast<uint32_t>(mass);
  const uint32_t old = static_cast<uint32_t>(atomic_add(low, static_cast<int32_t>(part)));
  const uint32_t rest = static_cast<uint32_t>(mass >> 32) + (old + part < old ? 1u : 0u);
  if (rest != 0) atomic_add(high, static_cast<int32_t>(rest));
}
__device__ __forceinline__ uint64_t both_halves(int32_t low, int32_t high) {
  return static_cast<uint32_t>(low) | static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32;
}

// How many of the logits equal to v are needed, and whether that is all of them.
__device__ __forceinline__ Prefix count_ties(const Candidates& from, const Search& search, uint64_t mass) {
  const uint64_t one = from.mass(from_key(search.pattern));
  const int64_t available = static_cast<int64_t>(mass / one);
  const auto reached = [&](int64_t ties) {
    return static_cast<double>(search.before + static_cast<uint64_t>(ties) * one) >= search.target;
  };
  const double needed = ceil((search.target - static_cast<double>(search.before)) / static_cast<double>(one));
  int64_t ties = needed < 1.0                              ? 1
                 : needed < static_cast<double>(available) ? static_cast<int64_t>(needed)
                                                           : available;
  while (ties > 1 && reached(ties - 1)) --ties;
  while (ties < available && !reached(ties)) ++ties;
  const bool cut = ties < available || (search.pattern == from.within.key && from.within.ties != kAllTies);
  return {search.pattern, cut ? ties : kAllTies};
}

// Goes down into the bin where the target is reached, by the whole row's histogram of `step`; after a last level,
// search->kept is the shortest prefix of the candidates that holds their share, at least one of them. For all threads
// of the block, each with the same search.
__device__ __forceinline__ void choose_bin(const SampleProblem& p, const Filters& filters, int64_t slot,
                                           int step, FilterSmem& smem, Search* search) {
  const Candidates from = make_candidates(p, filters, slot, filters.by_mass(step), search->kept);
  if (!from.wanted) return;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, shift = 24 - step % 4 * 8;
  // Thread i has the i-th bin from the top: `sum` is the mass down to it, its own included.
  const int bin = kBins - 1 - static_cast<int>(threadIdx.x);
  const int32_t* bins = row_bins(p, slot, step);
  const uint64_t own = both_halves(bins[bin], bins[kBins + bin]);
  uint64_t sum = own;
#pragma unroll
  for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
    const uint64_t other = shfl(sum, lane - lanes < 0 ? 0 : lane - lanes);
    if (lane >= lanes) sum += other;
  }
  if (lane == kWarpSize - 1) smem.warp_mass[warp] = sum;
  if (threadIdx.x == 0) smem.chosen = -1;
  block_sync();
  uint64_t total = 0;
  if (step % 4 == 0) search->before = search->pattern = 0;
  sum += search->before;
  for (int w = 0; w < kFilterWarps; ++w) {
    if (w < warp) sum += smem.warp_mass[w];
    total += smem.warp_mass[w];
  }
  if (step % 4 == 0) search->target = from.unit == 0.0 ? from.share : from.share * static_cast<double>(total);
  // The first bin with which the target is reached; else the last one that is not empty.
  if (own != 0)
    atomic_max(&smem.chosen, static_cast<double>(sum) >= search->target ? kBins + bin : kBins - 1 - bin);
  block_sync();
  const int chosen = smem.chosen >= kBins ? smem.chosen - kBins : kBins - 1 - smem.chosen;
  if (bin == chosen) {
    smem.before = sum - own;
    smem.mass = own;
  }
  block_sync();
  search->before = smem.before;
  search->pattern |= static_cast<uint32_t>(chosen) << shift;
  if (shift == 0) search->kept = shorter(search->kept, count_ties(from, *search, smem.mass));
}

// Where the row's search stands before `step`.
__device__ __forceinline__ Search resume_search(const SampleProblem& p, const Filters& filters, int64_t slot,
                                                int step, FilterSmem& smem) {
  if (step == 0) return {everything(), 0, 0.0, 0};
  Search search = p.searches[slot * 2 + (step - 1) % 2];
  choose_bin(p, filters, slot, step - 1, smem, &search);
  return search;
}

// Is there a distribution? If not, the draw reports it.
__device__ __forceinline__ bool has_top(const SampleProblem& p, int64_t slot) {
  const float top = float_of_order(p.tops[slot]);
  return top > -kInfinity && top <= kLargest;
}

// A block per slot and part of its columns: adds the masses of the candidates to the row's histogram of `step`.
__global__ void __launch_bounds__(kFilterThreads, 2) add_masses(SampleProblem p, Filters filters, int step) {
  Arena arena;
  FilterSmem& smem = *arena.take<FilterSmem>(1);
  const int64_t slot = blockIdx.y, begin = blockIdx.x * kPart;
  const int64_t end = begin + kPart < p.columns ? begin + kPart : p.columns;
  if (slot >= *p.count || !has_top(p, slot)) return;
  const Search search = resume_search(p, filters, slot, step, smem);
  if (begin == 0) {
    int32_t* next = row_bins(p, slot, step + 1);
    for (int i = threadIdx.x; i < 2 * kBins; i += kFilterThreads) next[i] = 0;
    if (threadIdx.x == 0) p.searches[slot * 2 + step % 2] = search;
  }
  const Candidates from = make_candidates(p, filters, slot, filters.by_mass(step), search.kept);
  if (!from.wanted) return;

  for (int i = threadIdx.x; i < kBins * kCopies; i += kFilterThreads) smem.low[i] = smem.high[i] = 0;
  block_sync();
  const int level = step % 4, shift = 24 - 8 * level;
  const uint32_t pattern = level == 0 ? 0u : search.pattern, mask = level == 0 ? 0u : ~0u << (shift + 8);
  const bool all = from.within.ties == kAllTies;
  const auto add = [&](uint32_t key, uint64_t mass) {
    const int at =
        static_cast<int>(key >> shift & (kBins - 1)) * kCopies + static_cast<int>(threadIdx.x % kCopies);
    if (mass != 0) add_mass(smem.low + at, smem.high + at, mass);
  };
  for_each_logit(p.logits + slot * p.columns, begin, end, [&](float v) {
    const uint32_t key = order_key(v);
    if ((key & mask) == pattern && key >= from.within.key && (all || key != from.within.key))
      add(key, from.mass(v));
  });
  if (begin == 0 && threadIdx.x == 0 && !all && (from.within.key & mask) == pattern)
    add(from.within.key, static_cast<uint64_t>(from.within.ties) * from.mass(from_key(from.within.key)));
  block_sync();
  uint64_t own = 0;
  for (int copy = 0; copy < kCopies; ++copy) {
    const int at = static_cast<int>(threadIdx.x) * kCopies + copy;
    own += both_halves(smem.low[at], smem.high[at]);
  }
  int32_t* bins = row_bins(p, slot, step);
  if (own != 0) add_mass(bins + threadIdx.x, bins + kBins + threadIdx.x, own);
}

// Column of the `ties`-th logit equal to v, for the thread that owns it: body(column). There are at least so many.
template <class Body>
__device__ __forceinline__ void find_tie(const float* x, int64_t count, float v, int64_t ties,
                                         FilterSmem& smem, const Body& body) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  // Each warp has a range of whole tiles; it counts there, and the one with the tie looks again.
  const int64_t tiles = count / kTile, begin = tiles * warp / kFilterWarps * kTile,
                end = tiles * (warp + 1) / kFilterWarps * kTile;
  const auto equal = [&](int64_t column, uint32_t (&lanes)[4]) {
    const Float4 logits = *reinterpret_cast<const Float4*>(x + column + 4 * lane);
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

// A block per slot: threshold and last_tie, once all steps are done. x is -inf where there is no id.
__global__ void __launch_bounds__(kFilterThreads, 2) find_prefix(SampleProblem p, Filters filters) {
  Arena arena;
  FilterSmem& smem = *arena.take<FilterSmem>(1);
  const int64_t slot = blockIdx.x;
  if (slot >= *p.count || !has_top(p, slot)) return;
  const float* x = p.logits + slot * p.columns;
  Prefix kept = resume_search(p, filters, slot, filters.steps(), smem).kept;
  const float min_p = filters.min_p[p.row_index[slot]];
  if (min_p > 0.0f) {
    const Candidates all = make_candidates(p, filters, slot, false, kept);
    const float limit = static_cast<float>(log(static_cast<double>(min_p)));
    float least = all.top;
    for_each_logit(x, 0, p.columns, [&](float v) {
      least = (v - all.top) / all.temperature >= limit ? fminf(least, v) : least;
    });
    least = reduce_block(least, smem, [](float a, float b) { return fminf(a, b); });
    kept = shorter(kept, {order_key(least), kAllTies});
  }
  if (threadIdx.x == 0) p.rows[slot].threshold = from_key(kept.key);
  if (kept.ties != kAllTies)
    find_tie(x, p.columns, from_key(kept.key), kept.ties, smem,
             [&](int64_t column) { p.rows[slot].last_tie = static_cast<int32_t>(column); });
}

}  // namespace
}  // namespace esokern::cuda
