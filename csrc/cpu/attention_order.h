// Queries and keys of a sequence in the order in which their mask is nearest to a staircase: keys by rank, queries by
// how far they see. Tokens in any order (Eso-LM's training) then leave as many tiles hidden as a causal mask does.
#pragma once

#include "common/mask.h"
#include "cpu/simd.h"
#include "tensor.h"

namespace esokern::cpu::ESOKERN_ISA {
namespace {

// An i32 tensor of one number per row of a sequence.
struct Ints {
  const int32_t* data;
  int64_t stride;
  int32_t at(int64_t i) const { return data[i * stride]; }
};

// Sorts the indices 0 .. count - 1 into `order`, equal ones by index; before(a, b): a goes ahead of b. `spare` is as
// much memory again. Merges runs of growing length; what is in order already costs one look.
template <class Before>
void sort_indices(int32_t* order, int32_t* spare, int64_t count, const Before& before) {
  bool sorted = true;
  for (int64_t i = 0; i < count; ++i) {
    order[i] = static_cast<int32_t>(i);
    sorted = sorted && (i == 0 || !before(order[i], order[i - 1]));
  }
  int32_t *from = order, *to = spare;
  for (int64_t run = 1; run < count && !sorted; run *= 2) {
    for (int64_t begin = 0; begin < count; begin += 2 * run) {
      const int64_t middle = begin + run < count ? begin + run : count;
      const int64_t end = begin + 2 * run < count ? begin + 2 * run : count;
      int64_t left = begin, right = middle;
      for (int64_t i = begin; i < end; ++i)
        to[i] = left < middle && (right == end || !before(from[right], from[left])) ? from[left++]
                                                                                    : from[right++];
    }
    int32_t* const merged = to;
    to = from;
    from = merged;
  }
  if (from != order) __builtin_memcpy(order, from, static_cast<size_t>(count) * sizeof(int32_t));
}

// Those without a window come first: a tile of them is hidden from all ranks that windows single out.
ESOKERN_INLINE bool sees_less(QueryRange a, QueryRange b) {
  const bool a_window = a.window_start <= a.window_end, b_window = b.window_start <= b.window_end;
  if (a_window != b_window) return b_window;
  if (a.prefix_end != b.prefix_end) return a.prefix_end < b.prefix_end;
  return a_window && a.window_start < b.window_start;
}

// The mask of one sequence. `Args` is that of attention or of its backward; first_*: places in packed tensors.
struct SequenceMask {
  Ints k_rank, prefix_end, window_start, window_end;

  template <class Args>
  SequenceMask(const Args& a, int64_t b, int64_t first_row, int64_t first_key) {
    const auto ints = [&](const Tensor& t, int64_t first) {
      const int32_t* data = static_cast<const int32_t*>(t.data);
      return a.cu_seqlens_q.given() ? Ints{data + first * t.stride[0], t.stride[0]}
                                    : Ints{data + b * t.stride[0], t.stride[1]};
    };
    k_rank = ints(a.k_rank, first_key);
    prefix_end = ints(a.prefix_end, first_row);
    window_start = ints(a.window_start, first_row);
    window_end = ints(a.window_end, first_row);
  }

  int32_t rank(int64_t j) const { return k_rank.data == nullptr ? 0 : k_rank.at(j); }
  QueryRange range(int64_t i) const {
    if (k_rank.data == nullptr) return {INT32_MAX, 0, -1};
    if (window_start.data == nullptr) return {prefix_end.at(i), 0, -1};
    return {prefix_end.at(i), window_start.at(i), window_end.at(i)};
  }
  void sort_queries(int32_t* order, int32_t* spare, int64_t rows) const {
    sort_indices(order, spare, rows, [&](int32_t x, int32_t y) { return sees_less(range(x), range(y)); });
  }
  void sort_keys(int32_t* order, int32_t* spare, int64_t keys) const {
    sort_indices(order, spare, keys, [&](int32_t x, int32_t y) { return rank(x) < rank(y); });
  }
};

}  // namespace
}  // namespace esokern::cpu::ESOKERN_ISA
