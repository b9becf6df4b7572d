// Who may attend to whom: three integers per query, one per key.
//   visible(i, j) = k_rank[j] <= prefix_end[i]  or  window_start[i] <= k_rank[j] <= window_end[i]
// A whole tile of keys with ranks in [rank_min, rank_max] can be skipped or taken unmasked by the same integers.
#pragma once

#include <cstdint>

#include "common/hd.h"

namespace esokern {

struct QueryRange {
  int32_t prefix_end;
  int32_t window_start;
  int32_t window_end;
};

ESOKERN_HD bool visible(QueryRange q, int32_t k_rank) {
  return k_rank <= q.prefix_end || (q.window_start <= k_rank && k_rank <= q.window_end);
}

// May any key with a rank in [rank_min, rank_max] be visible? (never wrong when it says no)
ESOKERN_HD bool tile_maybe_visible(QueryRange q, int32_t rank_min, int32_t rank_max) {
  return rank_min <= q.prefix_end || (q.window_start <= rank_max && rank_min <= q.window_end);
}

// Is every key with a rank in [rank_min, rank_max] visible? (never wrong when it says yes)
ESOKERN_HD bool tile_fully_visible(QueryRange q, int32_t rank_min, int32_t rank_max) {
  return rank_max <= q.prefix_end || (q.window_start <= rank_min && rank_max <= q.window_end);
}

// Range of row i of a call that appends `rows` rows, the first `num_clean` clean, behind `cached` rows of a cache
// whose ranks are its slot numbers. chunk_mask: 0 causal, 1 independent, 2 bidirectional (ops.h).
ESOKERN_HD QueryRange chunk_query_range(int64_t chunk_mask, int32_t cached, int32_t rows, int32_t num_clean,
                                        int32_t i) {
  if (chunk_mask == 2) return {cached + rows - 1, 0, -1};
  if (chunk_mask == 1 && i >= num_clean) return {cached + num_clean - 1, cached + i, cached + i};
  return {cached + i, 0, -1};
}

}  // namespace esokern
