// Gradients of attention under a rank-integer mask, from the forward's out and lse, over visible(i, j):
//   p_ij = exp(softmax_scale q_i . k_j - lse_i),  delta_i = dout_i . out_i - dlse_i,  ds_ij = p_ij (dout_i . v_j - delta_i)
//   dv_j = sum_i p_ij dout_i,  dk_j = softmax_scale sum_i ds_ij q_i,  dq_i = softmax_scale sum_j ds_ij k_j
//
// Work: one kernel computes delta, one dk and dv (a block owns 64 keys of a kv head and walks the queries of all its
// heads), one dq (a block owns 64 queries and walks the keys); tiles that see nothing of each other are skipped. Both
// compute scores, which makes seven products of five: to add up dq in the first by atomics would make its bits depend on
// what else the GPU does. So every call gives the same bits, whatever `deterministic` says. At head_dim 256 a block
// computes dk or dv, eight products, and in float32 owns 32 rows.
// Memory: attention_backward_tile.cuh; 34 to 97 KB of shared memory, where a key or query is read once per block that
// walks it. Scratch: 32 bytes per query and head, 24 per tile of queries, the ranges of ranks.
// Limits: float32, bfloat16, float16; head_dim a multiple of 8 up to 256. A walk has one block: few sequences with few kv
// heads leave a large GPU idle.
// Source: Dao, "FlashAttention-2", arXiv 2307.08691, algorithm 2.
#include "check_attention.h"
#include "cuda/attention_backward_kernels.cuh"
#include "cuda/attention_sequences.cuh"
#include "cuda/dispatch.h"

namespace esokern::cuda {
namespace {

RowFloatsView row_floats(const Tensor& t, bool packed) {
  if (!t.given()) return {};
  return {t.ptr<float>(), packed ? 0 : t.stride[0], t.stride[packed ? 0 : 1], t.stride[packed ? 1 : 2]};
}

BackwardProblem plan(const AttentionBackwardArgs& a, Scratch* scratch) {
  check_args(a);
  BackwardProblem p = {};
  p.forward = plan_sequences(a, scratch);
  ESOKERN_CHECK(p.forward.batch > 0 || a.k.shape[0] == 0,
                "keys of no sequence: cu_seqlens has one entry, keys", a.k.shape[0]);
  const AttentionProblem& f = p.forward;
  p.dout = rows_view(a.dout, f.packed);
  p.dq = rows_view(a.dq, f.packed);
  p.dk = rows_view(a.dk, f.packed);
  p.dv = rows_view(a.dv, f.packed);
  p.lse = row_floats(a.lse, f.packed);
  p.dlse = row_floats(a.dlse, f.packed);
  p.softmax_scale = a.softmax_scale;
  p.scale = kLog2e * a.softmax_scale;
  p.group = Divisor::of(f.group > 0 ? f.group : 1);
  plan_ranks(&p.forward, scratch);
  dispatch_dtype(a.q.dtype, [&]<class T>() {
    dispatch_head_dim(f.head_dim, [&]<int kHeadDim>() { p.hull_lanes = BackwardTile<T, kHeadDim>::kOthers; });
  });
  const int64_t tiles = ceil_div(most_lanes(f), p.hull_lanes);
  p.hull_tiles = f.packed ? 1 : tiles;
  p.hulls = scratch->take<Hull>(f.packed ? tiles + f.batch : f.batch * tiles);
  p.lanes = scratch->take<LaneNumbers>(f.kv_heads * f.total_rows * f.group);
  return p;
}

template <class Block, class Numbers, class Tile>
int64_t shared_bytes(bool both_own) {
  ArenaSize size;
  const typename Tile::template Smem<Block, Numbers> smem(size, both_own);
  static_cast<void>(smem);
  return size.bytes();
}

// Blocks of `rows` rows for all sequences.
int64_t blocks_of(const AttentionProblem& p, int64_t each, int64_t total, int64_t rows) {
  return p.packed ? total / rows + p.batch : p.batch * ceil_div(each, rows);
}

template <class T, int kHeadDim, bool kWantKeys, bool kWantValues>
void launch_keys(const BackwardProblem& p, void* stream) {
  using Tile = BackwardTile<T, kHeadDim>;
  const AttentionProblem& f = p.forward;
  launch("attention_backward_keys", keys_kernel<T, kHeadDim, kWantKeys, kWantValues>,
         Grid{blocks_of(f, f.max_keys, f.max_keys, Tile::kOwn), 1, f.kv_heads}, Tile::kThreads,
         shared_bytes<KeyBlock<T>, LaneNumbers, Tile>(kWantKeys), stream, p);
}

}  // namespace

int64_t attention_backward_workspace(const AttentionBackwardArgs& args) {
  Scratch scratch(nullptr);
  plan(args, &scratch);
  return scratch.bytes();
}

void attention_backward(const AttentionBackwardArgs& args, void* workspace, void* stream) {
  Scratch scratch(workspace);
  const BackwardProblem p = plan(args, &scratch);
  const AttentionProblem& f = p.forward;
  if (f.batch == 0) return;
  find_sequences(f, args, stream);
  run_ranks(f, stream);
  const int64_t lanes = f.total_rows * f.group;
  dispatch_dtype(args.q.dtype, [&]<class T>() {
    const Grid grid = {blocks_of(f, most_lanes(f), lanes, kPrepareLanes), 1, f.kv_heads};
    if (lanes > 0) launch("attention_backward_lanes", lanes_kernel<T>, grid, kThreads, 0, stream, p);
    dispatch_head_dim(f.head_dim, [&]<int kHeadDim>() {
      using Tile = BackwardTile<T, kHeadDim>;
      if constexpr (Tile::kBothAtOnce) {
        launch_keys<T, kHeadDim, true, true>(p, stream);
      } else {
        launch_keys<T, kHeadDim, true, false>(p, stream);
        launch_keys<T, kHeadDim, false, true>(p, stream);
      }
      if (lanes > 0)
        launch("attention_backward_queries", queries_kernel<T, kHeadDim>,
               Grid{blocks_of(f, most_lanes(f), lanes, Tile::kOwn), 1, f.kv_heads}, Tile::kThreads,
               shared_bytes<QueryBlock<T>, int32_t, Tile>(true), stream, p);
    });
  });
}

}  // namespace esokern::cuda
