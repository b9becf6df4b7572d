// What the gradient kernels share: the lanes' numbers, shared memory, the products of a tile.
//
//   warp    has 16 of the block's own rows (keys, or lanes) and all rows of the tile that the block has come to
//   memory  own rows stay; two stages of a tile each, one under way while the other is worked on
//   numbers scores, weights and gradients of scores stay in registers from one product to the next: the accumulators of
//           m16n8 are the operand that the following product wants. Fragments: attention_tile.cuh
#pragma once

#include "cuda/attention_tile.cuh"

namespace esokern::cuda {
namespace {

// What a gradient asks of a lane. Zeros, which copies put past the last lane, make it count for nothing: its row of
// queries and its row of dout are zeros too.
struct alignas(16) LaneNumbers {
  float lse2;  // lse to base 2
  QueryRange range;
  float delta;  // dout . out - dlse; not beside lse2, or both would be loaded at once and fill registers
  int32_t unused[3];
};

// An f32 [batch, heads, seqlen] or [heads, tokens] tensor; nullptr = not given.
struct RowFloatsView {
  const float* data;
  int64_t batch, head, row;

  __device__ __forceinline__ float at(int64_t b, int64_t h, int64_t i) const {
    return data[b * batch + h * head + i * row];
  }
};

// Division of 0 <= n < 2^31 by a multiplication (Granlund and Montgomery, "Division by invariant integers using
// multiplication", 1994).
struct Divisor {
  uint32_t divisor, magic, shift;

  static Divisor of(int64_t divisor) {
    uint32_t shift = 0;
    while (int64_t{1} << shift < divisor) ++shift;
    const int64_t magic = ((int64_t{1} << shift) - divisor) * (int64_t{1} << 32) / divisor + 1;
    return {static_cast<uint32_t>(divisor), static_cast<uint32_t>(magic), shift};
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    return (static_cast<uint32_t>(uint64_t{n} * magic >> 32) + n) >> shift;
  }
};

struct BackwardProblem {
  AttentionProblem forward;
  RowsView dout, dq, dk, dv;
  RowFloatsView lse, dlse;
  float softmax_scale, scale;  // scale: to base 2, with its sign
  Divisor group;

  // Workspace. lanes: those of kv head h and sequence b begin at h * total_rows * group + first row * group. hulls: of
  // every hull_lanes lanes, those of sequence b begin at b * hull_tiles + first_query * group / hull_lanes.
  LaneNumbers* lanes;
  Hull* hulls;
  int64_t hull_tiles;
  int32_t hull_lanes;
};

__device__ __forceinline__ LaneNumbers* lanes_of(const BackwardProblem& p, int64_t b, const Sequence& seq,
                                                 int64_t kv_head) {
  const int64_t first_row = p.forward.packed ? seq.first_query : b * p.forward.seqlen_q;
  return p.lanes + (kv_head * p.forward.total_rows + first_row) * p.forward.group;
}
__device__ __forceinline__ Hull* hulls_of(const BackwardProblem& p, int64_t b, const Sequence& seq) {
  return p.hulls + b * p.hull_tiles + seq.first_query * p.forward.group / p.hull_lanes;
}

// Where the lanes of a sequence and kv head lie in a tensor of the queries' shape.
template <class T>
struct LaneRows {
  T* first;
  int64_t row, head;
  Divisor group;

  __device__ __forceinline__ T* at(int32_t lane) const {
    const uint32_t i = group.quotient(lane);
    return first + i * row + (lane - i * group.divisor) * head;
  }
};
template <class T>
__device__ __forceinline__ LaneRows<T> lane_rows(const BackwardProblem& p, const RowsView& t, int64_t b,
                                                 const Sequence& seq, int64_t kv_head) {
  return {row_of<T>(t, b, seq.first_query, kv_head * p.forward.group), t.row, t.head, p.group};
}

// Where the keys of a sequence and kv head lie.
template <class T>
struct PlainRows {
  T* first;
  int64_t row;

  __device__ __forceinline__ T* at(int32_t j) const { return first + j * row; }
};
template <class T>
__device__ __forceinline__ PlainRows<T> plain_rows(const RowsView& t, int64_t b, const Sequence& seq,
                                                   int64_t kv_head) {
  return {row_of<T>(t, b, seq.first_key, kv_head), t.row};
}

// Tile shapes: what registers (without spills) and 99 KB of shared memory allow.
template <class T, int kHeadDim>
struct BackwardTile : TileRows<T, kHeadDim> {
  static constexpr int kBlockWarps = kIsFloat<T> && kHeadDim == 256 ? 2 : 4;
  static constexpr int kThreads = kBlockWarps * kWarpSize;
  static constexpr int kOwn = 16 * kBlockWarps;
  static constexpr int kOthers = (kHeadDim == 256 ? 16 : 32) / (kIsFloat<T> && kHeadDim > 64 ? 2 : 1);
  static constexpr int kKeyTiles = kOthers / 8;
  // Fragments of own rows stay in registers.
  static constexpr bool kKeepQuery = !kIsFloat<T> && kHeadDim == 64;
  static constexpr int kKept = kKeepQuery ? kHeadDim / 16 : 1;
  // Registers have room for what adds up to dk and to dv.
  static constexpr bool kBothAtOnce = kHeadDim <= 128;

  // Numbers: of another row, LaneNumbers or a rank.
  template <class Block, class Numbers>
  struct Smem {
    T* own[2];
    T* ring;           // [2 stages][2][kOthers][kHeadDim]
    Numbers* numbers;  // [2][kOthers]
    Block* block;

#pragma nv_exec_check_disable
    template <class Source>
    __host__ __device__ Smem(Source& source, bool both_own)
        : own{source.template take<T>(kOwn * kHeadDim),
              both_own ? source.template take<T>(kOwn * kHeadDim) : nullptr},
          ring(source.template take<T>(4 * kOthers * kHeadDim)),
          numbers(source.template take<Numbers>(2 * kOthers)),
          block(source.template take<Block>(1)) {}
    __device__ __forceinline__ T* other(int stage, int which) const {
      return ring + (2 * stage + which) * kOthers * kHeadDim;
    }
  };
};

// A warp's own rows of one tensor: in shared memory, and their fragments in registers if they stay there.
template <class Tile, class T>
struct OwnRows {
  const T* rows;
  uint32_t kept[Tile::kKept][4];

  __device__ __forceinline__ void keep() {
    if constexpr (Tile::kKeepQuery) {
      const int lane = threadIdx.x % kWarpSize;
      const uint32_t place = smem_address(rows + Tile::at(lane / 8 % 2 * 8 + lane % 8, lane / 16));
#pragma unroll
      for (int k = 0; k < Tile::kKept; ++k) ldmatrix_x4(kept[k], Tile::further(place, 2 * k));
    }
  }
  // products[own row][other row] = their inner product.
  __device__ __forceinline__ void times(float (&products)[Tile::kKeyTiles][4], const T* others) const {
#pragma unroll
    for (int n = 0; n < Tile::kKeyTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) products[n][i] = 0.0f;
    if constexpr (kIsFloat<T>)
      score_floats<Tile>(products, rows, others, 0);
    else
      score_halves<Tile, false>(products, kept, rows, rows, others, 0);
  }
};

// What a warp adds up for its own rows: element (own row, column) in the places of an accumulator.
template <class Tile, class T>
struct Gradient {
  float sum[Tile::kColumnTiles][4];

  __device__ __forceinline__ Gradient() {
#pragma unroll
    for (int n = 0; n < Tile::kColumnTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[n][i] = 0.0f;
  }
  // += weights[own row][other row] times the others' rows.
  __device__ __forceinline__ void add(const float (&weights)[Tile::kKeyTiles][4], const T* others) {
    if constexpr (kIsFloat<T>)
      add_floats<Tile>(sum, weights, others, 0);
    else
      add_halves<Tile, false>(sum, weights, others, 0);
  }
  // Own rows are those from `begin` on, as far as `end`; columns come times `factor`.
  template <class Rows>
  __device__ __forceinline__ void store(const Rows& rows, int32_t begin, int32_t end, int head_dim,
                                        float factor, bool aligned) const {
    const int t = threadIdx.x % 4, g = threadIdx.x % kWarpSize / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int32_t r = begin + static_cast<int32_t>(threadIdx.x / kWarpSize) * 16 + g + 8 * h;
      if (r >= end) continue;
      T* to = rows.at(r);
#pragma unroll
      for (int n = 0; n < Tile::kColumnTiles; ++n)
        if (8 * n < head_dim)
          store_pair(to, 8 * n + 2 * t, sum[n][2 * h] * factor, sum[n][2 * h + 1] * factor, aligned);
    }
  }
};

// Rows begin <= r < end of a sequence that cannot be followed.
template <class T, class Rows>
__device__ __forceinline__ void store_nans(const Rows& rows, int32_t begin, int32_t end, int head_dim) {
  for (int item = threadIdx.x; item < (end - begin) * head_dim; item += blockDim.x)
    rows.at(begin + item / head_dim)[item % head_dim] = from_float<T>(__builtin_nanf(""));
}

// body(tile, stage, unmasked) for every tile of the walk. load(tile, stage) starts the copies of one, while the one before
// is worked on; ready() runs when what had been started before this call is there.
template <class Walk, class Load, class Ready, class Body>
__device__ __forceinline__ void for_each_tile(Walk& walk, const Load& load, const Ready& ready,
                                              const Body& body) {
  bool more = walk.find();
  if (more) load(walk.tile, 0);
  const auto arrived = [] {
    copy_async_commit();
    copy_async_wait<0>();
    block_sync();
  };
  arrived();
  ready();
#pragma unroll 1
  for (int stage = 0; more; stage ^= 1) {
    const int32_t tile = walk.tile;
    const bool unmasked = walk.unmasked();
    ++walk.tile;
    more = walk.find();
    if (more) load(walk.tile, stage ^ 1);
    body(tile, stage, unmasked);
    arrived();
  }
}

}  // namespace
}  // namespace esokern::cuda
