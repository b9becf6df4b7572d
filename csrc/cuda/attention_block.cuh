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

// Which lanes of which sequence a block has.
struct Place {
  int32_t b, all_lanes, first_lane;  // of the sequence and kv head
  int lanes;                         // 0: nothing to do
  Sequence seq;
};
template <class T, bool kFew>
__device__ __forceinline__ Place find_place(const AttentionProblem& p) {
  constexpr int kLanes = kFew ? kFewLanes : kManyLanes;
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
  const bool mine = kIsFloat<T> || (place.all_lanes <= kFewLanes) == kFew;
  place.lanes = !mine || left <= 0 ? 0 : left < kLanes ? left : kLanes;
  return place;
}

// Bounds on what the lanes of a block see: `any` contains what some lane sees, `all` lies in what every lane sees.
struct Hull {
  QueryRange any, all;
};

__device__ __forceinline__ Hull hull_of(int lanes, const QueryRange* ranges) {
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
    const QueryRange range = ranges[r];
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
  const int32_t* rank_ranges;  // of this sequence; nullptr: the row number is the rank
};
template <class T>
__device__ __forceinline__ KeyRows<T> key_rows(const AttentionProblem& p, const RowsView& t,
                                               const Place& place, int64_t kv_head) {
  const bool paged = p.pages != nullptr;
  return {row_of<T>(t, paged ? 0 : place.seq.cache_row, place.seq.first_key, kv_head), t.row, t.batch,
          paged ? p.pages + place.b * p.pages_batch : nullptr, p.page_size};
}
template <class T>
__device__ __forceinline__ Block<T> make_block(const AttentionProblem& p, const Place& place,
                                               const Splits& splits, const Hull& hull, int64_t kv_head) {
  return {place,
          splits,
          hull,
          key_rows<T>(p, p.k, place, kv_head),
          key_rows<T>(p, p.v, place, kv_head),
          p.k_rank.data == nullptr
              ? nullptr
              : p.rank_ranges + 2 * (place.b * p.rank_tiles + place.seq.first_key / kRankTile)};
}

// The tiles of one split that some lane may see, in order. All threads of a warp take the same steps.
template <int kBlockKV, class Block>
struct TileWalk {
  const Block* block;
  int32_t tile = 0, end_key = 0;
  int32_t window = -1;  // the 32 tiles that the next two describe begin here
  uint32_t some = 0, whole = 0;

  __device__ __forceinline__ void start(int split) {
    const Splits splits = block->splits;
    tile = split * splits.keys / kBlockKV;
    end_key = split + 1 == splits.count ? block->place.seq.keys : (split + 1) * splits.keys;
  }
  // Moves on to a tile that is not hidden, if need be; false at the end of the split.
  __device__ __forceinline__ bool find() {
    while (tile * kBlockKV < end_key) {
      if (tile / 32 * 32 != window) look(tile / 32 * 32);
      const uint32_t rest = some >> (tile - window);
      if ((rest & 1) != 0) return true;
      tile = rest == 0 ? window + 32 : tile + 1;
    }
    return false;
  }
  // Every lane sees every key of this tile, which ends before the split does.
  __device__ __forceinline__ bool unmasked() const {
    return (whole >> (tile - window) & 1) != 0 && (tile + 1) * kBlockKV <= end_key;
  }
  __device__ __forceinline__ void look(int32_t first) {
    window = first;
    const int64_t mine = first + static_cast<int32_t>(threadIdx.x % kWarpSize);
    const int32_t keys = block->place.seq.keys;
    const int32_t* rank_ranges = block->rank_ranges;
    bool maybe = false, fully = false;
    if (mine * kBlockKV < keys) {
      int32_t low = static_cast<int32_t>(mine * kBlockKV);
      int32_t high = keys - low > kBlockKV ? low + kBlockKV - 1 : keys - 1;
      if (rank_ranges != nullptr) {
        const int64_t from = mine * kBlockKV / kRankTile, to = high / kRankTile;
        low = INT32_MAX;
        high = INT32_MIN;
        for (int64_t i = from; i <= to; ++i) {
          const int32_t tile_low = rank_ranges[2 * i], tile_high = rank_ranges[2 * i + 1];
          low = tile_low < low ? tile_low : low;
          high = tile_high > high ? tile_high : high;
        }
      }
      maybe = tile_maybe_visible(block->hull.any, low, high);
      fully = tile_fully_visible(block->hull.all, low, high);
    }
    some = ballot(maybe);
    whole = ballot(fully);
  }
};

}  // namespace
}  // namespace esokern::cuda
