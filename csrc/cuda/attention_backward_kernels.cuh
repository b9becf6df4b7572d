// The three kernels of attention's gradients; attention_backward.cu says what they compute.
#pragma once

#include <cstring>

#include "cuda/attention_backward_tile.cuh"

namespace esokern::cuda {
namespace {

constexpr int kPrepareLanes = kManyLanes;
constexpr float kLog2e = 1.4426950408889634f;

// The sum of dout times out over this thread's columns of a row: chunks of 16 bytes, eight threads in turn.
template <class T>
__device__ __forceinline__ float partial_dot(const T* dout, const T* out, int head_dim, bool aligned) {
  constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  float sum = 0.0f;
  for (int column = threadIdx.x % 8 * kElements; column < head_dim; column += 8 * kElements) {
    T a[kElements], b[kElements];
    if (aligned) {
      const Bytes16 x = load_16(dout + column), y = load_16(out + column);
      memcpy(a, &x, sizeof a);
      memcpy(b, &y, sizeof b);
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        a[e] = dout[column + e];
        b[e] = out[column + e];
      }
    }
#pragma unroll
    for (int e = 0; e < kElements; ++e) sum += to_float(a[e]) * to_float(b[e]);
  }
  return sum;
}

// LaneNumbers of kPrepareLanes lanes, eight threads each; for one kv head also their hulls, which are the same for all.
template <class T>
__global__ void __launch_bounds__(kThreads) lanes_kernel(const BackwardProblem p) {
  const AttentionProblem& f = p.forward;
  const Place place = find_place<kPrepareLanes>(f);
  if (place.lanes == 0 || place.seq.keys < 0) return;
  const int64_t kv_head = blockIdx.z;
  const auto row = [&](int r) { return static_cast<int32_t>(p.group.quotient(place.first_lane + r)); };
#pragma unroll 1
  for (int pass = 0; pass < kPrepareLanes; pass += kThreads / 8) {
    const int r = pass + static_cast<int>(threadIdx.x) / 8;
    const int valid = r < place.lanes ? r : 0;
    const int64_t i = place.seq.first_query + row(valid);
    const int64_t head = kv_head * f.group + place.first_lane + valid - row(valid) * f.group;
    float delta = partial_dot<T>(row_of<T>(p.dout, place.b, i, head), row_of<T>(f.out, place.b, i, head),
                                 f.head_dim, p.dout.aligned && f.out.aligned);
#pragma unroll
    for (int lanes = 1; lanes <= 4; lanes *= 2) delta += shfl_xor(delta, lanes);
    if (threadIdx.x % 8 != 0 || r >= place.lanes) continue;
    const float lse = p.lse.at(place.b, head, i);
    if (p.dlse.data != nullptr) delta -= p.dlse.at(place.b, head, i);
    // A query that sees nothing has no part in any gradient, whatever comes back to it.
    lanes_of(p, place.b, place.seq, kv_head)[place.first_lane + r] = {
        lse * kLog2e, query_range(f, place.b, place.seq, row(r)), lse == kNegInf ? 0.0f : delta, {}};
  }
  if (kv_head != 0) return;
  Hull* hulls = hulls_of(p, place.b, place.seq) + place.first_lane / p.hull_lanes;
  for (int tile = threadIdx.x / kWarpSize; tile * p.hull_lanes < place.lanes; tile += kWarps) {
    const int first = tile * p.hull_lanes, left = place.lanes - first;
    const Hull hull = hull_of(left < p.hull_lanes ? left : p.hull_lanes,
                              [&](int r) { return query_range(f, place.b, place.seq, row(first + r)); });
    if (threadIdx.x % kWarpSize == 0) hulls[tile] = hull;
  }
}

// Which keys of which sequence a block has.
struct KeyPlace {
  int32_t b, begin, end;  // begin >= end: none
  Sequence seq;
};
// Where cu_seqlens cannot be followed, the first sequence has all keys of the call, and their gradients are NaN.
template <int kKeys>
__device__ __forceinline__ KeyPlace find_keys(const AttentionProblem& p) {
  int64_t b = 0, block = blockIdx.x;
  int32_t all_keys = p.max_keys;
  if (!p.packed) {
    const int64_t blocks = (p.max_keys + kKeys - 1) / kKeys;
    b = blockIdx.x / blocks;
    block = blockIdx.x % blocks;
  } else if (p.sequences[0].keys >= 0) {
    const auto first_block = [&](int64_t b) { return p.sequences[b].first_key / kKeys + b; };
    b = find_sequence(p.batch, blockIdx.x, first_block);
    block = blockIdx.x - first_block(b);
    all_keys = p.sequences[b].keys;
  }
  const int32_t begin = static_cast<int32_t>(block * kKeys);
  return {static_cast<int32_t>(b), begin, all_keys - begin < kKeys ? all_keys : begin + kKeys,
          sequence(p, b)};
}

// A block's keys, and the lanes that may see them.
template <class T>
struct KeyBlock {
  KeyPlace place;
  int32_t lanes;
  RankRange ranks;
  const Hull* hulls;  // of kOthers lanes each
  const LaneNumbers* numbers;
  LaneRows<T> queries, douts;

  template <int kLanes>
  __device__ __forceinline__ Sight sight(int64_t tile) const {
    if (tile * kLanes >= lanes) return {};
    return sight_of(hulls[tile], ranks);
  }
};

// dk and dv of a block's keys, or one of them.
template <class T, int kHeadDim, bool kWantKeys, bool kWantValues>
__global__ void __launch_bounds__(BackwardTile<T, kHeadDim>::kThreads, 2)
    keys_kernel(const BackwardProblem p) {
  using Tile = BackwardTile<T, kHeadDim>;
  constexpr int kLanes = Tile::kOthers;
  const AttentionProblem& f = p.forward;
  const int64_t kv_head = blockIdx.z;
  Arena arena;
  const typename Tile::template Smem<KeyBlock<T>, LaneNumbers> smem(arena, kWantKeys);
  {
    const KeyPlace place = find_keys<Tile::kOwn>(f);
    const Sequence& seq = place.seq;
    if (place.begin >= place.end) return;
    if (seq.keys < 0) {
      if constexpr (kWantKeys)
        store_nans<T>(plain_rows<T>(p.dk, place.b, seq, kv_head), place.begin, place.end, f.head_dim);
      if constexpr (kWantValues)
        store_nans<T>(plain_rows<T>(p.dv, place.b, seq, kv_head), place.begin, place.end, f.head_dim);
      return;
    }
    if (threadIdx.x == 0)
      *smem.block = {place,
                     static_cast<int32_t>(seq.rows * f.group),
                     rank_range_of(rank_ranges_of(f, place.b, seq), place.begin, place.end - 1),
                     hulls_of(p, place.b, seq),
                     lanes_of(p, place.b, seq, kv_head),
                     lane_rows<T>(p, f.q, place.b, seq, kv_head),
                     lane_rows<T>(p, p.dout, place.b, seq, kv_head)};
  }
  block_sync();
  const KeyBlock<T>& block = *smem.block;
  const KeyPlace& place = block.place;

  load_tile<Tile, Tile::kOwn>(smem.own[0], plain_rows<T>(f.k, place.b, place.seq, kv_head), place.begin,
                              place.end, f.head_dim, f.k.aligned);
  if constexpr (kWantKeys)
    load_tile<Tile, Tile::kOwn>(smem.own[1], plain_rows<T>(f.v, place.b, place.seq, kv_head), place.begin,
                                place.end, f.head_dim, f.v.aligned);
  const auto load = [&](int32_t tile, int stage) {
    const int32_t first = tile * kLanes;
    load_tile<Tile, kLanes>(smem.other(stage, 0), block.queries, first, block.lanes, f.head_dim, f.q.aligned);
    load_tile<Tile, kLanes>(smem.other(stage, 1), block.douts, first, block.lanes, f.head_dim,
                            p.dout.aligned);
    for (int half = threadIdx.x; half < 2 * kLanes; half += Tile::kThreads) {
      const int32_t lane = first + half / 2;
      const bool valid = lane < block.lanes;
      copy_async_16(smem_address(smem.numbers + stage * kLanes) + 16 * half,
                    reinterpret_cast<const Bytes16*>(block.numbers + (valid ? lane : 0)) + half % 2, valid);
    }
  };

  const int t = threadIdx.x % 4, g = threadIdx.x % kWarpSize / 4, first_own = threadIdx.x / kWarpSize * 16;
  int32_t rank[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int32_t own = place.begin + first_own + g + 8 * h, j = own < place.end ? own : place.begin;
    rank[h] = f.k_rank.data == nullptr ? j : f.k_rank.at(place.b, place.seq.first_key + j);
  }
  OwnRows<Tile, T> keys = {smem.own[0] + first_own * kHeadDim};
  OwnRows<Tile, T> values = {smem.own[kWantKeys] + first_own * kHeadDim};
  Gradient<Tile, T> dk, dv;
  TileWalk<kLanes, KeyBlock<T>> walk = {&block};
  walk.start(0, block.lanes);
  for_each_tile(
      walk, load,
      [&] {
        keys.keep();
        if constexpr (kWantKeys) values.keep();
      },
      [&](int32_t, int stage, bool unmasked) {
        const T *queries = smem.other(stage, 0), *douts = smem.other(stage, 1);
        const LaneNumbers* numbers = smem.numbers + stage * kLanes + 2 * t;
        float weights[Tile::kKeyTiles][4];
        keys.times(weights, queries);
#pragma unroll
        for (int n = 0; n < Tile::kKeyTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            weights[n][i] = exp2_fast(weights[n][i] * p.scale - numbers[8 * n + i % 2].lse2);
        if (!unmasked) {
#pragma unroll
          for (int n = 0; n < Tile::kKeyTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              if (!visible(numbers[8 * n + i % 2].range, rank[i / 2])) weights[n][i] = 0.0f;
        }
        if constexpr (kWantValues) dv.add(weights, douts);
        if constexpr (kWantKeys) {
          float slopes[Tile::kKeyTiles][4];
          values.times(slopes, douts);
#pragma unroll
          for (int n = 0; n < Tile::kKeyTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              slopes[n][i] = weights[n][i] * (slopes[n][i] - numbers[8 * n + i % 2].delta);
          dk.add(slopes, queries);
        }
      });
  if constexpr (kWantKeys)
    dk.store(plain_rows<T>(p.dk, place.b, place.seq, kv_head), place.begin, place.end, f.head_dim,
             p.softmax_scale, p.dk.aligned);
  if constexpr (kWantValues)
    dv.store(plain_rows<T>(p.dv, place.b, place.seq, kv_head), place.begin, place.end, f.head_dim, 1.0f,
             p.dv.aligned);
}

// A block's lanes, and the keys that they may see.
template <class T>
struct QueryBlock {
  Place place;
  Hull hull;
  const int32_t* rank_ranges;
  PlainRows<T> key_rows, value_rows;

  template <int kKeys>
  __device__ __forceinline__ Sight sight(int64_t tile) const {
    return sight_of_keys<kKeys>(hull, rank_ranges, tile, place.seq.keys);
  }
};

// dq of a block's lanes.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(BackwardTile<T, kHeadDim>::kThreads, 2)
    queries_kernel(const BackwardProblem p) {
  using Tile = BackwardTile<T, kHeadDim>;
  constexpr int kKeys = Tile::kOthers;
  const AttentionProblem& f = p.forward;
  const int64_t kv_head = blockIdx.z;
  Arena arena;
  const typename Tile::template Smem<QueryBlock<T>, int32_t> smem(arena, true);
  {
    const Place place = find_place<Tile::kOwn>(f);
    const Sequence& seq = place.seq;
    const int32_t begin = place.first_lane, end = begin + place.lanes;
    if (place.lanes == 0) return;
    if (seq.keys < 0)
      return store_nans<T>(lane_rows<T>(p, p.dq, place.b, seq, kv_head), begin, end, f.head_dim);
    const LaneNumbers* numbers = lanes_of(p, place.b, seq, kv_head) + begin;
    const Hull hull = hull_of(place.lanes, [&](int r) { return numbers[r].range; });
    if (threadIdx.x == 0)
      *smem.block = {place, hull, rank_ranges_of(f, place.b, seq), plain_rows<T>(f.k, place.b, seq, kv_head),
                     plain_rows<T>(f.v, place.b, seq, kv_head)};
  }
  block_sync();
  const QueryBlock<T>& block = *smem.block;
  const Place& place = block.place;

  load_tile<Tile, Tile::kOwn>(smem.own[0], lane_rows<T>(p, f.q, place.b, place.seq, kv_head),
                              place.first_lane, place.all_lanes, f.head_dim, f.q.aligned);
  load_tile<Tile, Tile::kOwn>(smem.own[1], lane_rows<T>(p, p.dout, place.b, place.seq, kv_head),
                              place.first_lane, place.all_lanes, f.head_dim, p.dout.aligned);
  const bool ranked = f.k_rank.data != nullptr;
  const auto load = [&](int32_t tile, int stage) {
    const int32_t first = tile * kKeys, end = place.seq.keys, j = first + static_cast<int32_t>(threadIdx.x);
    load_tile<Tile, kKeys>(smem.other(stage, 0), block.key_rows, first, end, f.head_dim, f.k.aligned);
    load_tile<Tile, kKeys>(smem.other(stage, 1), block.value_rows, first, end, f.head_dim, f.v.aligned);
    if (ranked && threadIdx.x < kKeys)
      copy_async_4(
          smem_address(smem.numbers + stage * kKeys + threadIdx.x),
          f.k_rank.data + place.b * f.k_rank.batch + (j < end ? place.seq.first_key + j : 0) * f.k_rank.row,
          j < end);
  };

  const int t = threadIdx.x % 4, g = threadIdx.x % kWarpSize / 4, first_own = threadIdx.x / kWarpSize * 16;
  float lse2[2], delta[2];
  QueryRange range[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = first_own + g + 8 * h;
    const LaneNumbers& own =
        lanes_of(p, place.b, place.seq, kv_head)[place.first_lane + (r < place.lanes ? r : 0)];
    lse2[h] = own.lse2;
    delta[h] = own.delta;
    range[h] = own.range;
  }
  OwnRows<Tile, T> queries = {smem.own[0] + first_own * kHeadDim};
  OwnRows<Tile, T> douts = {smem.own[1] + first_own * kHeadDim};
  Gradient<Tile, T> dq;
  TileWalk<kKeys, QueryBlock<T>> walk = {&block};
  walk.start(0, place.seq.keys);
  for_each_tile(
      walk, load,
      [&] {
        queries.keep();
        douts.keep();
      },
      [&](int32_t tile, int stage, bool unmasked) {
        float weights[Tile::kKeyTiles][4], slopes[Tile::kKeyTiles][4];
        queries.times(weights, smem.other(stage, 0));
#pragma unroll
        for (int n = 0; n < Tile::kKeyTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) weights[n][i] = exp2_fast(weights[n][i] * p.scale - lse2[i / 2]);
        if (!unmasked) {
#pragma unroll
          for (int n = 0; n < Tile::kKeyTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int at = 8 * n + 2 * t + i % 2, j = tile * kKeys + at;
              const int32_t rank = ranked ? smem.numbers[stage * kKeys + at] : j;
              if (j >= place.seq.keys || !visible(range[i / 2], rank)) weights[n][i] = 0.0f;
            }
        }
        douts.times(slopes, smem.other(stage, 1));
#pragma unroll
        for (int n = 0; n < Tile::kKeyTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) slopes[n][i] = weights[n][i] * (slopes[n][i] - delta[i / 2]);
        dq.add(slopes, smem.other(stage, 0));
      });
  dq.store(lane_rows<T>(p, p.dq, place.b, place.seq, kv_head), place.first_lane, place.all_lanes, f.head_dim,
           p.softmax_scale, p.dq.aligned);
}

}  // namespace
}  // namespace esokern::cuda
