// What both tile loops of attention work on: the keys of a sequence, a block of query rows with its running
// softmax.
//
//   out_i = sum_j p_ij v_j / l_i,  p_ij = 2^(s_ij - m_i),  s_ij = log2(e) softmax_scale q_i . k_j over
//   visible j
//
// A block is up to 64 "lanes": query rows of one sequence times the query heads that share a kv head. m and l
// are row_max and row_sum. Results depend on the block's own lanes, keys and head_dim, never on its
// neighbours.
#pragma once

#include "common/mask.h"
#include "cpu/simd.h"
#include "ops.h"

namespace esokern::cpu::ESOKERN_ISA {
namespace {

constexpr int kMaxHeadDim = 256;
constexpr int kLanes = 16;              // query rows in one group of vector lanes
constexpr int kVecs = kLanes / kWidth;  // native vectors per group
constexpr int kGroups = 4;              // groups per block: staged keys are used this often
constexpr int kBlockLanes = kGroups * kLanes;
constexpr int kShortSum =
    32;  // products along head_dim that are added up before they join the rest: less rounding
constexpr float kNegInf = -__builtin_inff();
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

template <class T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<bf16> = true;

// Keys and values of one (sequence, kv head): rows [0, count), contiguous, in some order, or by page.
template <class T>
struct Keys {
  const T* k;
  const T* v;
  int64_t k_row_stride, v_row_stride;
  const int32_t* pages;  // nullptr = contiguous
  int64_t page_size, k_page_stride, v_page_stride;
  const int32_t* rank;  // nullptr = the row number is the rank
  int64_t rank_stride;
  const int32_t* order;  // which row comes j-th; nullptr = row j
  int32_t count;

  int64_t row(int64_t j) const { return order == nullptr ? j : order[j]; }
  const T* k_row(int64_t j) const {
    return pages == nullptr ? k + row(j) * k_row_stride
                            : k + pages[j / page_size] * k_page_stride + j % page_size * k_row_stride;
  }
  const T* v_row(int64_t j) const {
    return pages == nullptr ? v + row(j) * v_row_stride
                            : v + pages[j / page_size] * v_page_stride + j % page_size * v_row_stride;
  }
  int32_t rank_of(int64_t j) const {
    return rank == nullptr ? static_cast<int32_t>(j) : rank[row(j) * rank_stride];
  }
};

// A block of query lanes and its running softmax. Lane r lives in group r / 16, lane r % 16.
struct alignas(64) Block {
  float q[kGroups][kMaxHeadDim][kLanes];
  // If the block works on pairs: the queries as pairs of bf16, and what rounding lost (a rotated query is no
  // bf16).
  uint32_t q_pair[kGroups][kMaxHeadDim / 2][kLanes];
  uint32_t q_rest[kGroups][kMaxHeadDim / 2][kLanes];
  float out[kGroups][kMaxHeadDim][kLanes];
  float row_max[kGroups][kLanes];
  float row_sum[kGroups][kLanes];
  int32_t prefix_end[kGroups][kLanes];
  int32_t window_start[kGroups][kLanes];
  int32_t window_end[kGroups][kLanes];
  int32_t prefix_min[kGroups];  // every lane of the group sees all ranks up to this
  float scale;                  // log2(e) * softmax_scale
  int lanes;
  int head_dim;
  bool pairs;
  bool any_rest;  // some q_rest is not zero

  void set_query(int r, const float* row, QueryRange range) {
    const int g = r / kLanes, lane = r % kLanes;
    if (pairs) {
      for (int d = 0; d < head_dim; d += 2) {
        bf16 pair[2], rest[2];
        for (int i = 0; i < 2; ++i) {
          from_float(row[d + i], &pair[i]);
          from_float(row[d + i] - to_float(pair[i]), &rest[i]);
        }
        q_pair[g][d / 2][lane] = pair[0].bits | static_cast<uint32_t>(pair[1].bits) << 16;
        q_rest[g][d / 2][lane] = rest[0].bits | static_cast<uint32_t>(rest[1].bits) << 16;
        any_rest |= (q_rest[g][d / 2][lane] & 0x7fff7fffu) != 0;
      }
    } else {
      for (int d = 0; d < head_dim; ++d) q[g][d][lane] = row[d];
    }
    prefix_end[g][lane] = range.prefix_end;
    window_start[g][lane] = range.window_start;
    window_end[g][lane] = range.window_end;
  }
  // Zero the running state; lanes past the last one see nothing.
  void start() {
    const int used = (lanes + kLanes - 1) / kLanes;
    for (int g = 0; g < used; ++g) {
      for (int d = 0; d < head_dim; ++d)
        for (int lane = 0; lane < kLanes; ++lane) out[g][d][lane] = 0.0f;
      for (int lane = 0; lane < kLanes; ++lane) {
        row_max[g][lane] = kNegInf;
        row_sum[g][lane] = 0.0f;
        if (g * kLanes + lane < lanes) {
          const int32_t prefix = prefix_end[g][lane];
          prefix_min[g] = lane == 0 || prefix < prefix_min[g] ? prefix : prefix_min[g];
          continue;
        }
        for (int d = 0; d < head_dim; ++d) q[g][d][lane] = 0.0f;
        for (int d = 0; d < head_dim / 2; ++d) q_pair[g][d][lane] = q_rest[g][d][lane] = 0;
        prefix_end[g][lane] = INT32_MIN;
        window_start[g][lane] = 0;
        window_end[g][lane] = -1;
      }
    }
  }
  QueryRange range(int r) const {
    const int g = r / kLanes, lane = r % kLanes;
    return {prefix_end[g][lane], window_start[g][lane], window_end[g][lane]};
  }
};

// The finished row of lane r: divided by the sum; 0 and -inf where no key was visible. Returns the natural
// lse.
ESOKERN_INLINE float finish_row(const Block& block, int r, float* row) {
  const int g = r / kLanes, lane = r % kLanes;
  const float sum = block.row_sum[g][lane];
  const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
  for (int d = 0; d < block.head_dim; ++d) row[d] = block.out[g][d][lane] * inverse;
  return sum > 0.0f ? (block.row_max[g][lane] + __builtin_log2f(sum)) * kLn2 : kNegInf;
}

}  // namespace
}  // namespace esokern::cpu::ESOKERN_ISA
