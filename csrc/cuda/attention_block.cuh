// One block's share of the work: which lanes of which sequence, which tiles of keys they may see, where results go.
#pragma once

#include "cuda/attention_rows.cuh"

namespace esokern::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr float kNegInf = -__builtin_inff();
constexpr float kLn2 = 0.6931471805599453f;

template <class T>
constexpr bool kIsFloat = sizeof(T) == 4;

// Columns d and d + 1 of a row, d even.
template <class T>
__device__ __forceinline__ void store_pair(T* row, int d, float x, float y, bool aligned) {
  if constexpr (!kIsFloat<T>) {
    if (aligned) {
      *reinterpret_cast<uint32_t*>(row + d) = pack<T>(x, y);
      return;
    }
  }
  row[d] = from_float<T>(x);
  row[d + 1] = from_float<T>(y);
}

// Which lanes of which sequence a block has.
struct Place {
  int32_t b, all_lanes, first_lane;  // of the sequence and kv head
  int lanes;                         // 0: nothing to do
  Sequence seq;
};
template <int kLanes>
__device__ __forceinline__ Place find_place(const AttentionProblem& p) {
  Place place;
  int64_t block;
  if (p.packed) {
    // Sequence b owns the blocks from first_query * group / kLanes + b on: always enough of them.
    const auto first_block = [&](int64_t b) { return p.sequences[b].first_query * p.group / kLanes + b; };
    place.b = static_cast<int32_t>(find_sequence(p.batch, blockIdx.x, first_block));
    block = blockIdx.x - first_block(place.b);
  } else {
    const int64_t blocks = (p.seqlen_q * p.group + kLanes - 1) / kLanes;
    place.b = static_cast<int32_t>(blockIdx.x / blocks);
    block = blocks - 1 - blockIdx.x % blocks;  // causal: the longest first
  }
  place.seq = sequence(p, place.b);
  place.all_lanes = static_cast<int32_t>(place.seq.rows * p.group);
  place.first_lane = static_cast<int32_t>(block * kLanes);
  const int left = place.all_lanes - place.first_lane;
  place.lanes = left <= 0 ? 0 : left < kLanes ? left : kLanes;
  return place;
}

// Bounds on what the lanes of a block see: `any` contains what some lane sees, `all` lies in what every lane sees.
struct Hull {
  QueryRange any, all;
};

// range(r) of every lane r < lanes, by a converged warp.
template <class Range>
__device__ __forceinline__ Hull hull_of(int lanes, const Range& range_of) {
  Hull h = {{INT32_MIN, INT32_MAX, INT32_MIN}, {INT32_MAX, INT32_MIN, INT32_MAX}};
  const auto join = [&](const Hull& o) {
    const auto low = [](int32_t a, int32_t b) { return a < b ? a : b; };
    const auto high = [](int32_t a, int32_t b) { return a > b ? a : b; };
    h.any = {high(h.any.prefix_end, o.any.prefix_end), low(h.any.window_start, o.any.window_start),
             high(h.any.window_end, o.any.window_end)};
    h.all = {low(h.all.prefix_end, o.all.prefix_end), high(h.all.window_start, o.all.window_start),
             low(h.all.window_end, o.all.window_end)};
  };
  for (int r = threadIdx.x % kWarpSize; r < lanes; r += kWarpSize) {
    const QueryRange range = range_of(r);
    // An empty window leaves the hull of windows as it is.
    const bool window = range.window_start <= range.window_end;
    join({{range.prefix_end, window ? range.window_start : INT32_MAX, window ? range.window_end : INT32_MIN},
          range});
  }
  for (int lane_mask = 1; lane_mask < kWarpSize; lane_mask *= 2)
    join({{shfl_xor(h.any.prefix_end, lane_mask), shfl_xor(h.any.window_start, lane_mask),
           shfl_xor(h.any.window_end, lane_mask)},
          {shfl_xor(h.all.prefix_end, lane_mask), shfl_xor(h.all.window_start, lane_mask),
           shfl_xor(h.all.window_end, lane_mask)}});
  return h;
}

// The ranks of some keys: the least and the greatest.
struct RankRange {
  int32_t low, high;
};
// Of the keys first <= j <= last of a sequence, or of whole rank tiles around them.
__device__ __forceinline__ RankRange rank_range_of(const int32_t* rank_ranges, int32_t first, int32_t last) {
  if (rank_ranges == nullptr) return {first, last};
  RankRange range = {INT32_MAX, INT32_MIN};
#pragma unroll 1
  for (int32_t i = first / kRankTile; i <= last / kRankTile; ++i) {
    const int32_t low = rank_ranges[2 * i], high = rank_ranges[2 * i + 1];
    range = {low < range.low ? low : range.low, high > range.high ? high : range.high};
  }
  return range;
}

// What queries see of keys: something perhaps, everything for sure.
struct Sight {
  bool some, whole;
};
__device__ __forceinline__ Sight sight_of(const Hull& hull, const RankRange& ranks) {
  return {tile_maybe_visible(hull.any, ranks.low, ranks.high),
          tile_fully_visible(hull.all, ranks.low, ranks.high)};
}

// The same of keys: tile `tile` of kKeys keys, of `keys` in all.
template <int kKeys>
__device__ __forceinline__ Sight sight_of_keys(const Hull& hull, const int32_t* rank_ranges, int64_t tile,
                                               int32_t keys) {
  if (tile * kKeys >= keys) return {};
  const int32_t first = static_cast<int32_t>(tile * kKeys);
  const int32_t last = keys - first > kKeys ? first + kKeys - 1 : keys - 1;
  return sight_of(hull, rank_range_of(rank_ranges, first, last));
}

// Where the rows of k or v of one (sequence, kv head) lie.
template <class T>
struct KeyRows {
  const T* first;  // row 0 of the outer index 0 if paged
  int64_t row, page;
  const int32_t* pages;
  int32_t page_size;

  __device__ __forceinline__ const T* at(int32_t j) const {
    if (pages == nullptr) return first + j * row;
    return first + pages[j / page_size] * page + j % page_size * row;
  }
};

// What a block knows of its work: in shared memory, since registers are scarce.
template <class T>
struct Block {
  Place place;
  Splits splits;
  Hull hull;
  KeyRows<T> keys, values;
  const int32_t* rank_ranges;

  // Of `split`, which ends where the next begins.
  __device__ __forceinline__ int32_t begin_key(int split) const { return split * splits.keys; }
  __device__ __forceinline__ int32_t end_key(int split) const {
    return split + 1 == splits.count ? place.seq.keys : (split + 1) * splits.keys;
  }
  template <int kKeys>
  __device__ __forceinline__ Sight sight(int64_t tile) const {
    return sight_of_keys<kKeys>(hull, rank_ranges, tile, place.seq.keys);
  }
};
template <class T>
__device__ __forceinline__ KeyRows<T> key_rows(const AttentionProblem& p, const RowsView& t, int64_t b,
                                               const Sequence& seq, int64_t kv_head) {
  const bool paged = p.pages != nullptr;
  return {row_of<T>(t, paged ? 0 : seq.cache_row, seq.first_key, kv_head), t.row, t.batch,
          paged ? p.pages + b * p.pages_batch : nullptr, p.page_size};
}
// (min, max) of every kRankTile keys of a sequence; nullptr: the row number is the rank.
__device__ __forceinline__ const int32_t* rank_ranges_of(const AttentionProblem& p, int64_t b,
                                                         const Sequence& seq) {
  if (p.k_rank.data == nullptr) return nullptr;
  return p.rank_ranges + 2 * (b * p.rank_tiles + seq.first_key / kRankTile);
}
template <class T>
__device__ __forceinline__ Block<T> make_block(const AttentionProblem& p, const Place& place,
                                               const Splits& splits, const Hull& hull, int64_t kv_head) {
  return {place,
          splits,
          hull,
          key_rows<T>(p, p.k, place.b, place.seq, kv_head),
          key_rows<T>(p, p.v, place.b, place.seq, kv_head),
          rank_ranges_of(p, place.b, place.seq)};
}

// The tiles of kRows rows, among those from begin to end, that a block has to do with, in order: block->sight<kRows>(tile)
// says which. All threads of a warp take the same steps.
template <int kRows, class Block>
struct TileWalk {
  const Block* block;
  int32_t tile = 0, end = 0;
  int32_t window = -1;  // the 32 tiles that the next two describe begin here
  uint32_t some = 0, whole = 0;

  __device__ __forceinline__ void start(int32_t begin_row, int32_t end_row) {
    tile = begin_row / kRows;
    end = end_row;
  }
  // Moves on to a tile that is not hidden, if need be; false at the end.
  __device__ __forceinline__ bool find() {
    while (tile * kRows < end) {
      if (tile / 32 * 32 != window) look(tile / 32 * 32);
      const uint32_t rest = some >> (tile - window);
      if ((rest & 1) != 0) return true;
      tile = rest == 0 ? window + 32 : tile + 1;
    }
    return false;
  }
  // All rows see each other in this tile, which ends before `end`.
  __device__ __forceinline__ bool unmasked() const {
    return (whole >> (tile - window) & 1) != 0 && (tile + 1) * kRows <= end;
  }
  __device__ __forceinline__ void look(int32_t first) {
    window = first;
    const Sight sight =
        block->template sight<kRows>(int64_t{first} + static_cast<int32_t>(threadIdx.x % kWarpSize));
    some = ballot(sight.some);
    whole = ballot(sight.whole);
  }
};

}  // namespace
}  // namespace esokern::cuda
