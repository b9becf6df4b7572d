// Attention over keys wherever they lie, for both ops:
//   out_i = sum_j p_ij v_j / l_i,  p_ij = 2^(s_ij - m_i),  s_ij = log2(e) softmax_scale q_i . k_j over visible j
//
// Work: a block owns 64 lanes (four warps of 16) of a sequence and kv head, or all of a sequence with up to 16, whose
// keys its warps share; float32 always the latter. It walks the splits blockIdx.y, + gridDim.y, ... of the keys and in
// each the tiles that some lane may see. One split writes the output, more leave partial rows that combine_kernel
// merges in order. Results depend on the sequence's own lengths only.
// Memory: attention_tile.cuh; a key or value is read once per block, unless hidden. 40 to 98 KB of shared memory.
// Limits: float32, bfloat16, float16; head_dim a multiple of 8 up to 256. Source: Dao, "FlashAttention-2",
// arXiv 2307.08691; Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867.
#include "cuda/attention_output.cuh"
#include "cuda/dispatch.h"

namespace esokern::cuda {
namespace {

// Rows of queries into shared memory: times the sign of the scale, rotated, zeros past the last lane and column.
template <class Tile, class T>
__device__ __forceinline__ void load_queries(const AttentionProblem& p, const Place& place, int64_t kv_head,
                                             const typename Tile::Smem& smem) {
  for (int item = threadIdx.x; item < Tile::kLanes * Tile::kChunks; item += kThreads) {
    const int r = item / Tile::kChunks, chunk = item % Tile::kChunks, column = chunk * Tile::kChunkElements;
    T* to = smem.query + Tile::at(r, chunk);
    const bool valid = r < place.lanes && column < p.head_dim;
    const int64_t lane = valid ? place.first_lane + r : place.first_lane;
    const int64_t i = place.seq.first_query + lane / p.group, head = kv_head * p.group + lane % p.group;
    const T* from = row_of<T>(p.q, place.b, i, head);
    if (p.rotary.half > 0) {
      const int64_t position = p.rotary.positions.at(place.b, i);
#pragma unroll
      for (int e = 0; e < Tile::kChunkElements; ++e) {
        const float x = valid ? rotated(p.rotary, from, column + e, position) * p.query_factor : 0.0f;
        to[e] = from_float<T>(x);
        if constexpr (!kIsFloat<T>)
          smem.query_rest[Tile::at(r, chunk) + e] = from_float<T>(x - to_float(from_float<T>(x)));
      }
    } else if (valid && p.q.aligned && p.query_factor == 1.0f) {
      store_16(to, load_16(from + column));
    } else {
#pragma unroll
      for (int e = 0; e < Tile::kChunkElements; ++e)
        to[e] = from_float<T>(valid ? to_float(from[column + e]) * p.query_factor : 0.0f);
    }
  }
}

template <class T, int kHeadDim, bool kFew>
__global__ void __launch_bounds__(kThreads, Tile<T, kHeadDim, kFew>::kBlocks)
    attention_kernel(const AttentionProblem p) {
  using Tile = Tile<T, kHeadDim, kFew>;
  constexpr int kSlots = Tile::kSlots, kBlockKV = Tile::kBlockKV;
  const Place place = find_place<Tile::kLanes>(p);
  const int64_t kv_head = blockIdx.z;
  const bool mine = kIsFloat<T> || (place.all_lanes <= kFewLanes) == kFew;
  if (place.lanes == 0 || !mine) return;
  if (place.seq.keys < 0) return store_nan<T>(p, place, kv_head);
  const Splits splits = split_keys(place.all_lanes, place.seq.keys, kIsFloat<T>);
  if (static_cast<int>(blockIdx.y) >= splits.count) return;

  Arena arena;
  const typename Tile::Smem smem(arena, p.rotary.half > 0);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const int first_row = kFew ? 0 : 16 * warp, first_key = kFew ? warp * Tile::kWarpKeys : 0;
  if (threadIdx.x < Tile::kLanes) {
    const int r = static_cast<int>(threadIdx.x) < place.lanes ? threadIdx.x : place.lanes - 1;
    smem.range[threadIdx.x] = query_range(p, place.b, place.seq, (place.first_lane + r) / p.group);
  }
  block_sync();
  const Hull hull = hull_of(place.lanes, [&](int r) { return smem.range[r]; });
  if (threadIdx.x == 0) *smem.block = make_block<T>(p, place, splits, hull, kv_head);
  block_sync();
  const Block<T>& block = *smem.block;

  // Copies run kSlots - 1 tiles ahead, across the splits of this block.
  const bool ranked = p.k_rank.data != nullptr;
  TileWalk<kBlockKV, Block<T>> ahead = {&block};
  int ahead_split = blockIdx.y, ahead_slot = 0;
  const auto start = [&](TileWalk<kBlockKV, Block<T>>& walk, int split) {
    walk.start(block.begin_key(split), block.end_key(split));
  };
  start(ahead, ahead_split);
  const auto load_keys = [&] {
    while (ahead_split < block.splits.count && !ahead.find()) {
      ahead_split += gridDim.y;
      if (ahead_split < block.splits.count) start(ahead, ahead_split);
    }
    if (ahead_split < block.splits.count) {
      const int32_t begin = ahead.tile * kBlockKV, j = begin + static_cast<int32_t>(threadIdx.x);
      load_tile<Tile, kBlockKV>(smem.ring + ahead_slot * kBlockKV * kHeadDim, block.keys, begin, ahead.end,
                                p.head_dim, p.k.aligned);
      if (ranked && threadIdx.x < kBlockKV)
        copy_async_4(smem_address(smem.rank + ahead_slot * kBlockKV + threadIdx.x),
                     p.k_rank.data + block.place.b * p.k_rank.batch +
                         (j < ahead.end ? block.place.seq.first_key + j : 0) * p.k_rank.row,
                     j < ahead.end);
    }
    copy_async_commit();
    ahead_slot = ahead_slot + 1 == kSlots ? 0 : ahead_slot + 1;
  };
  const auto load_values = [&] {
    if (ahead_split < block.splits.count)
      load_tile<Tile, kBlockKV>(smem.ring + ahead_slot * kBlockKV * kHeadDim, block.values,
                                ahead.tile * kBlockKV, ahead.end, p.head_dim, p.v.aligned);
    copy_async_commit();
    ++ahead.tile;
    ahead_slot = ahead_slot + 1 == kSlots ? 0 : ahead_slot + 1;
  };
#pragma unroll 1
  for (int i = 0; i < (kSlots - 1) / 2; ++i) {
    load_keys();
    load_values();
  }
  if constexpr (kSlots % 2 == 0) load_keys();

  load_queries<Tile, T>(p, block.place, kv_head, smem);
  block_sync();
  const T* query = smem.query + first_row * kHeadDim;
  uint32_t kept[Tile::kKept][4];
  if constexpr (Tile::kKeepQuery) {
    const uint32_t place = smem_address(query + Tile::at(lane / 8 % 2 * 8 + lane % 8, lane / 16));
#pragma unroll
    for (int k = 0; k < Tile::kKept; ++k) ldmatrix_x4(kept[k], Tile::further(place, 2 * k));
  }
  TileWalk<kBlockKV, Block<T>> walk = {&block};
  int slot = 0;
  // Waits for a tile; then the one before it, which all warps have left, is loaded with what comes kSlots - 1 later.
  const auto arrived = [&] {
    copy_async_wait<kSlots - 2>();
    block_sync();
  };
  const auto leave_tile = [&] { slot = slot + 1 == kSlots ? 0 : slot + 1; };
#pragma unroll 1
  for (int split = blockIdx.y; split < block.splits.count; split += gridDim.y) {
    RunningSoftmax softmax = {{kNegInf, kNegInf}, {0.0f, 0.0f}};
    float out[Tile::kColumnTiles][4];
#pragma unroll
    for (int n = 0; n < Tile::kColumnTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0.0f;
#pragma unroll 1
    for (start(walk, split); walk.find(); ++walk.tile) {
      float scores[Tile::kKeyTiles][4];
#pragma unroll
      for (int n = 0; n < Tile::kKeyTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
      arrived();
      if constexpr (kSlots % 2 == 0)
        load_values();
      else
        load_keys();
      const T* tile = smem.ring + slot * kBlockKV * kHeadDim;
      if constexpr (kIsFloat<T>)
        score_floats<Tile>(scores, query, tile, first_key);
      else if (p.rotary.half > 0)
        score_halves<Tile, true>(scores, kept, query, smem.query_rest + first_row * kHeadDim, tile,
                                 first_key);
      else
        score_halves<Tile, false>(scores, kept, query, query, tile, first_key);
      if (!walk.unmasked()) {
        const QueryRange range[2] = {smem.range[first_row + g], smem.range[first_row + g + 8]};
#pragma unroll
        for (int n = 0; n < Tile::kKeyTiles; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int at = first_key + 8 * n + 2 * t + i, j = walk.tile * kBlockKV + at;
            const int32_t rank = ranked ? smem.rank[slot * kBlockKV + at] : j;
#pragma unroll
            for (int h = 0; h < 2; ++h)
              if (j >= walk.end || !visible(range[h], rank)) scores[n][2 * h + i] = kNegInf;
          }
      }
      leave_tile();
      float keep[2];
      softmax.add(scores, p.scale, keep);
#pragma unroll
      for (int n = 0; n < Tile::kColumnTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[n][i] *= keep[i / 2];
      arrived();
      if constexpr (kSlots % 2 == 0)
        load_keys();
      else
        load_values();
      tile = smem.ring + slot * kBlockKV * kHeadDim;
      if constexpr (kIsFloat<T>)
        add_floats<Tile>(out, scores, tile, first_key);
      else
        add_halves<Tile, kFew>(out, scores, tile, first_key);
      leave_tile();
    }
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int lanes = 1; lanes <= 2; lanes *= 2) softmax.sum[h] += shfl_xor(softmax.sum[h], lanes);
    if constexpr (kFew)
      merge_and_store<Tile, T>(p, block.place, kv_head, split, block.splits.count, smem, softmax, out);
    else
      store_rows<Tile, T>(p, block.place, kv_head, split, block.splits.count, softmax, out);
  }
  copy_async_wait<0>();
}

// A warp merges the parts of one row, in the order of the splits.
template <class T>
__global__ void __launch_bounds__(kThreads) combine_kernel(const AttentionProblem p) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  const int64_t row = item / p.heads, head = item % p.heads;
  if (row >= p.total_rows) return;
  Place place;
  place.b = static_cast<int32_t>(
      p.packed ? find_sequence(p.batch, row, [&](int64_t b) { return p.sequences[b].first_query; })
               : row / p.seqlen_q);
  place.seq = sequence(p, place.b);
  const int64_t i = p.packed ? row - place.seq.first_query : row % p.seqlen_q;
  if (i >= place.seq.rows) return;
  const Splits splits = split_keys(place.seq.rows * p.group, place.seq.keys, kIsFloat<T>);
  if (splits.count == 1) return;
  const int64_t kv_head = head / p.group, lane = i * p.group + head % p.group;
  const RowOut<T> part(p, place, kv_head, lane, 0, splits.count), to(p, place, kv_head, lane, 0, 1);
  float best = kNegInf;
  for (int s = 0; s < splits.count; ++s) best = part.lse[s] > best ? part.lse[s] : best;
  const float shift = best == kNegInf ? 0.0f : best;
  float sum = 0.0f;
  for (int s = 0; s < splits.count; ++s) sum += exp2_fast(part.lse[s] - shift);
  const float inverse = sum > 0.0f ? 1.0f / sum : sum;
  for (int d = 2 * (threadIdx.x % kWarpSize); d < p.head_dim; d += 2 * kWarpSize) {
    float x = 0.0f, y = 0.0f;
    for (int s = 0; s < splits.count; ++s) {
      const float weight = exp2_fast(part.lse[s] - shift);
      x += weight * part.part[static_cast<int64_t>(s) * p.head_dim + d];
      y += weight * part.part[static_cast<int64_t>(s) * p.head_dim + d + 1];
    }
    to.store_pair(d, x * inverse, y * inverse, p.out.aligned);
    if (d == 0) to.store_lse(sum == 0.0f ? kNegInf : shift + log2_fast(sum));
  }
}

// The (min, max) rank of every kRankTile keys: a warp each.
__global__ void __launch_bounds__(kThreads) rank_kernel(const AttentionProblem p, int64_t blocks) {
  const int64_t b = blockIdx.x / blocks;
  const int64_t tile = blockIdx.x % blocks * kWarps + threadIdx.x / kWarpSize;
  const Sequence seq = sequence(p, b);
  if (tile * kRankTile >= seq.keys) return;
  const int64_t j = tile * kRankTile + threadIdx.x % kWarpSize;
  int32_t low = INT32_MAX, high = INT32_MIN;
  if (j < seq.keys) low = high = p.k_rank.at(b, seq.first_key + j);
  for (int lane_mask = 1; lane_mask < kWarpSize; lane_mask *= 2) {
    const int32_t other_low = shfl_xor(low, lane_mask), other_high = shfl_xor(high, lane_mask);
    low = other_low < low ? other_low : low;
    high = other_high > high ? other_high : high;
  }
  if (threadIdx.x % kWarpSize != 0) return;
  int32_t* to = p.rank_ranges + 2 * (b * p.rank_tiles + seq.first_key / kRankTile + tile);
  to[0] = low;
  to[1] = high;
}

template <class T, int kHeadDim, bool kFew>
void launch_attention(const AttentionProblem& p, void* stream) {
  using Tile = Tile<T, kHeadDim, kFew>;
  const int64_t blocks = p.packed ? p.total_rows * p.group / Tile::kLanes + p.batch
                                  : p.batch * ceil_div(most_lanes(p), Tile::kLanes);
  // Enough blocks to even out the last wave; each takes several splits if there are more.
  const int64_t wanted =
      ceil_div(int64_t{32} * multiprocessors(), blocks * p.kv_heads > 0 ? blocks * p.kv_heads : 1);
  const int64_t splits = most_splits(p, dtype_of<T>::value);
  ArenaSize size;
  const typename Tile::Smem smem(size, p.rotary.half > 0);
  static_cast<void>(smem);
  launch("attention", attention_kernel<T, kHeadDim, kFew>,
         Grid{blocks, wanted < splits ? wanted : splits, p.kv_heads}, kThreads, size.bytes(), stream, p);
}

}  // namespace

void run_ranks(const AttentionProblem& p, void* stream) {
  if (p.k_rank.data == nullptr) return;
  const int64_t blocks = ceil_div(ceil_div(p.max_keys, kRankTile), kWarps);
  launch("attention_ranks", rank_kernel, Grid{p.batch * blocks}, kThreads, 0, stream, p, blocks);
}

void run_attention(const AttentionProblem& p, DType dtype, void* stream) {
  if (p.group == 0 || p.total_rows == 0 || p.batch == 0) return;
  run_ranks(p, stream);
  dispatch_dtype(dtype, [&]<class T>() {
    dispatch_head_dim(p.head_dim, [&]<int kHeadDim>() {
      if (kIsFloat<T> || p.ragged || most_lanes(p) <= kFewLanes)
        launch_attention<T, kHeadDim, true>(p, stream);
      if constexpr (!kIsFloat<T>)
        if (most_lanes(p) > kFewLanes) launch_attention<T, kHeadDim, false>(p, stream);
    });
    if (most_splits(p, dtype) > 1)
      launch("attention_combine", combine_kernel<T>, Grid{ceil_div(p.total_rows * p.heads, kWarps)}, kThreads,
             0, stream, p);
  });
}

}  // namespace esokern::cuda
