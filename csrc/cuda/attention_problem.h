// What the attention ops tell the kernels that serve them (attention_kernel.cu), as plain data.
//
// A "lane" is a row of work: lane r of (sequence b, kv head) is query row r / group with query head
// kv_head * group + r % group, so that the heads that share keys share a block.
#pragma once

#include <cstdint>

#include "common/mask.h"
#include "cuda/device.cuh"
#include "tensor.h"

namespace esokern::cuda {

// Rows of a [batch, seqlen, heads, head_dim] or packed [tokens, heads, head_dim] tensor, strides in elements.
struct RowsView {
  void* data;
  int64_t batch, row, head;
  bool aligned;  // every row starts at a multiple of 16 bytes
};

// An i32 [batch, seqlen] or [tokens] tensor; nullptr = not given.
struct IntsView {
  const int32_t* data;
  int64_t batch, row;

  __device__ __forceinline__ int32_t at(int64_t b, int64_t i) const { return data[b * batch + i * row]; }
};

// One sequence of the batch. first_* are the places in packed tensors (0 in padded ones).
struct Sequence {
  int32_t first_query, rows;
  int32_t first_key, keys;  // keys < 0: some value of the sequence was out of range, outputs are NaN
  int32_t cached, clean;    // of a cache: rows before this call, leading clean rows of this call
  int32_t cache_row;        // outer index of k and v, unless paged
  int32_t unused;
};

constexpr int kEveryKeyVisible = -1;  // chunk_mask beside those of ops.h
constexpr int kExplicitRank = 3;

struct Rotary {
  const void* cos;
  const void* sin;
  DType dtype;
  int half;  // 0 = no rotation
  bool interleaved;
  int64_t cos_row, cos_column, sin_row, sin_column;
  IntsView positions;
};

struct AttentionProblem {
  RowsView out, q, k, v;
  float* lse;  // nullptr = not wanted
  int64_t lse_batch, lse_head, lse_row;

  int64_t batch, heads, kv_heads, group, total_rows;  // total_rows: of all sequences, used or not
  int32_t head_dim, seqlen_q, max_keys;               // packed: seqlen_q = total_q
  bool packed, packed_keys;
  bool ragged;         // the host does not know the rows of a sequence
  float scale;         // log2(e) |softmax_scale|, or 1 if that is 0
  float query_factor;  // the sign of softmax_scale

  Sequence* sequences;   // [batch], written by an earlier kernel; nullptr = seqlen_q rows, max_keys keys each
  const int32_t* pages;  // nullptr = contiguous
  int64_t pages_batch;
  int32_t page_size;

  int32_t chunk_mask;
  bool append;      // the rows of the call are keys too
  IntsView k_rank;  // not given: the row number is the rank
  IntsView prefix_end, window_start, window_end;
  Rotary rotary;

  // Workspace. rank_ranges: (min, max) rank per kRankTile keys; the tiles of sequence b begin at
  // b * rank_tiles + first_key / kRankTile. part_*: one row per (kv head, lane, split), those of sequence b begin
  // at b * part_sequence + first_query * group * part_lane.
  int32_t* rank_ranges;
  int64_t rank_tiles;
  float* part_out;
  float* part_lse;
  int64_t part_head, part_sequence, part_lane;
};

constexpr int kRankTile = 32;
constexpr int kFewLanes = 16;   // sequences of up to so many lanes are taken by the kernel for few rows
constexpr int kManyLanes = 64;  // lanes of a block of the other kernel
constexpr int32_t kMaxKeys = 1 << 30;  // of a sequence
constexpr int kSplitKeys = 256;        // a split has at least so many keys

// How the keys of a sequence are split among blocks: a function of its own lengths only.
struct Splits {
  int count, keys;  // keys of each but the last, a multiple of every tile
};
ESOKERN_HD Splits split_keys(int64_t lanes, int32_t keys, bool always_few) {
  const bool few = always_few || lanes <= kFewLanes;
  const int64_t blocks = few ? (lanes + kFewLanes - 1) / kFewLanes : (lanes + kManyLanes - 1) / kManyLanes;
  const int64_t most = blocks > 0 ? (few ? 32 : 16) / blocks : 1;
  const int64_t wanted = (static_cast<int64_t>(keys) + kSplitKeys - 1) / kSplitKeys;
  const int64_t count = wanted < most ? wanted : most;
  if (count <= 1) return {1, keys > 0 ? keys : 0};
  const int64_t each = ((keys + count - 1) / count + 63) / 64 * 64;
  return {static_cast<int>((keys + each - 1) / each), static_cast<int>(each)};
}

// --- host

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
inline int64_t most_lanes(const AttentionProblem& p) {
  return p.seqlen_q * p.group;
}
// The most splits that a sequence of this call can have.
inline int64_t most_splits(const AttentionProblem& p, DType dtype) {
  return split_keys(p.ragged ? 1 : most_lanes(p), p.max_keys, dtype == DType::f32).count;
}

// Hands out the scratch of a call in the order asked for; without memory it only counts the bytes.
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    const int64_t at = ceil_div(bytes_, 16) * 16;
    bytes_ = at + count * static_cast<int64_t>(sizeof(T));
    return memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + at);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

// Fills in what all ops have in common; checks what the kernels can serve.
AttentionProblem make_problem(const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k,
                              const Tensor& v, bool packed, int64_t batch, float softmax_scale);
RowsView rows_view(const Tensor& t, bool packed);
IntsView ints_view(const Tensor& t, bool packed);

// Takes rank_ranges, or all that run_attention needs of scratch.
void plan_ranks(AttentionProblem* problem, Scratch* scratch);
void plan_attention(AttentionProblem* problem, DType dtype, Scratch* scratch);
// Fills in rank_ranges, if there are explicit ranks.
void run_ranks(const AttentionProblem& problem, void* stream);
void run_attention(const AttentionProblem& problem, DType dtype, void* stream);

}  // namespace esokern::cuda
