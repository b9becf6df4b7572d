// Which of the drawn tokens a denoising step keeps: ops.h states it, a row of a batch is one block here.
// Work: the candidates are listed (list_slots.cuh). Each gets a key of 64 bits, its confidence in descending order
//   above its column: ascending keys are the order in which candidates are chosen, and no two are equal. How many are chosen
//   often follows from counts, and where that is all of them nothing is sorted. Otherwise the keys are, by a bitonic
//   network: for n candidates log2(n) (log2(n) + 1) / 2 steps of n / 2 pairs, 15 steps for 32, 55 for 1024. To find
//   the n-th key alone would be less work, but factor and entropy_bound ask for the order.
// Memory: a row is read from memory once, and again from L1. Keys take 8 bytes per column: of shared memory for widths
//   up to kSharedKeys, of the workspace beyond that.
// Limits: width below 2^31 - 1. A window outside of its text: num_masked is -1 and nothing is chosen.
// The entropies of a row are added by a warp whose lanes all make the same sum, in one order and in double: the bits of
//   a plain loop. Batcher, "Sorting networks and their applications", 1968.
#include "check_select.h"
#include "cuda/list_slots.cuh"
#include "cuda/per_row.cuh"
#include "cuda/select_order.cuh"

namespace esokern::cuda {
namespace {

constexpr int kWarps = kRowThreads / kWarpSize;
constexpr int64_t kSharedKeys = 12 * 1024;

// An argument [batch, columns]; data is null if it was not given.
template <class T>
struct Matrix {
  T* data;
  int64_t row_stride, stride;
  __device__ __forceinline__ T& operator()(int64_t row, int64_t column) const {
    return data[row * row_stride + column * stride];
  }
};

// The arguments. What is not given and NaN say the same: not for this row.
struct SelectProblem {
  Matrix<int64_t> tokens;
  Matrix<uint8_t> transfer_index;
  int32_t *num_masked, *num_transferred;
  uint8_t* done;
  Matrix<const int64_t> proposed;
  Matrix<const float> confidence, entropy;
  Matrix<const uint8_t> editable;
  PerRow<int64_t> window_start, window_length, seed, step;
  PerRow<int32_t> num_select;
  PerRow<float> threshold, factor, entropy_bound, temperature, edit_threshold, remask_threshold;
  int64_t length, width, mask_id;
};

// What the columns of a window are judged by.
struct Window {
  int64_t row, start, columns;
  bool done;
  float edit_threshold, remask_threshold;
};

// What becomes of a column whatever the others are, and whether it is a candidate.
struct Fate {
  bool masked, edited, taken_back, candidate;
};

struct Counts {
  int32_t masked, edited, taken_back, sure;  // sure: candidates that the threshold chooses
};

__device__ __forceinline__ Fate fate_of(const SelectProblem& p, const Window& w, int64_t column) {
  const int64_t token = p.tokens(w.row, w.start + column), proposed = p.proposed(w.row, column);
  const float confidence = p.confidence(w.row, column);
  const bool masked = token == p.mask_id, real = proposed != p.mask_id;
  const bool may_edit =
      !masked && !w.done && (p.editable.data == nullptr || p.editable(w.row, w.start + column) != 0);
  const bool edited = may_edit && real && proposed != token && confidence >= w.edit_threshold;
  const bool taken_back = may_edit && !edited && confidence < w.remask_threshold;
  return {masked, edited, taken_back, real && ((masked && !w.done) || taken_back)};
}

// A candidate's confidence, where NaN is the least.
__device__ __forceinline__ float certainty(const SelectProblem& p, int64_t row, int64_t column) {
  const float confidence = p.confidence(row, column);
  return confidence == confidence ? confidence : -kInfinity;
}

// Candidates are chosen by falling key.
struct Key {
  float temperature;
  uint32_t seed[2], step;
  __device__ __forceinline__ float operator()(float sure, int64_t position) const {
    if (!(temperature > 0.0f)) return sure;
    const float noise = selection_gumbel<Scalar>(static_cast<uint32_t>(position), step, seed[0], seed[1]);
    return temperature == kInfinity ? noise : sure / temperature + noise;
  }
};

__device__ __forceinline__ Key make_key(const SelectProblem& p, int64_t row) {
  const uint64_t seed = static_cast<uint64_t>(p.seed[row]);
  return {p.temperature[row],
          {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
          static_cast<uint32_t>(p.step[row])};
}

// By a block: the sum of what its threads have, for all threads. warp_counts: [kWarps] in shared memory.
__device__ __forceinline__ Counts sum_counts(Counts counts, Counts* warp_counts) {
#pragma unroll
  for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
    counts.masked += shfl_xor(counts.masked, lanes);
    counts.edited += shfl_xor(counts.edited, lanes);
    counts.taken_back += shfl_xor(counts.taken_back, lanes);
    counts.sure += shfl_xor(counts.sure, lanes);
  }
  if (threadIdx.x % kWarpSize == 0) warp_counts[threadIdx.x / kWarpSize] = counts;
  block_sync();
  counts = {};
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    counts.masked += warp_counts[warp].masked;
    counts.edited += warp_counts[warp].edited;
    counts.taken_back += warp_counts[warp].taken_back;
    counts.sure += warp_counts[warp].sure;
  }
  return counts;
}

// By a warp, of sorted keys: how many candidates factor and entropy_bound choose.
__device__ __forceinline__ int64_t count_ordered(const SelectProblem& p, int64_t row, const uint64_t* keys,
                                                 int64_t count) {
  const float factor = p.factor[row], bound = p.entropy_bound[row];
  int64_t chosen = 0;
  if (factor == factor) {
    chosen = count_leading(count, [&](int64_t i) {
      return i == 0 || certainty(p, row, column_of(keys[i])) >= 1.0f - factor / static_cast<float>(i + 2);
    });
    if (chosen == count - 1) chosen = count;
  }
  if (bound == bound) {
    const int64_t bounded = count_bounded(count, static_cast<double>(bound),
                                          [&](int64_t i) { return p.entropy(row, column_of(keys[i])); });
    chosen = bounded > chosen ? bounded : chosen;
  }
  return chosen;
}

// By a block: a window outside of the text.
__device__ __forceinline__ void refuse(const SelectProblem& p, int64_t row) {
  if (p.transfer_index.data != nullptr)
    for (int64_t column = threadIdx.x; column < p.width; column += kRowThreads)
      p.transfer_index(row, column) = 0;
  if (threadIdx.x == 0) {
    p.num_masked[row] = -1;
    p.num_transferred[row] = 0;
  }
}

struct SelectSmem {
  int32_t* list_counts;
  Counts* warp_counts;
  int64_t* chosen;
  uint64_t* keys;

#pragma nv_exec_check_disable
  template <class Source>
  __host__ __device__ SelectSmem(Source& source, int64_t num_keys)
      : list_counts(source.template take<int32_t>(kListCounts)),
        warp_counts(source.template take<Counts>(kWarps)),
        chosen(source.template take<int64_t>(1)),
        keys(source.template take<uint64_t>(num_keys)) {}
};

// A block per row. stored_keys: [batch][width], unless they are in shared memory.
template <bool kShared>
__global__ void __launch_bounds__(kRowThreads) select_rows(SelectProblem p, uint64_t* stored_keys) {
  Arena arena;
  const SelectSmem smem(arena, kShared ? p.width : 0);
  const int64_t row = blockIdx.x;
  uint64_t* const keys = kShared ? smem.keys : stored_keys + row * p.width;
  const Window w = {.row = row,
                    .start = p.window_start[row],
                    .columns = p.window_length[row],
                    .done = p.done != nullptr && p.done[row] != 0,
                    .edit_threshold = p.edit_threshold[row],
                    .remask_threshold = p.remask_threshold[row]};
  if (w.columns < 0 || w.columns > p.width || w.start < 0 || w.start > p.length - w.columns)
    return refuse(p, row);

  const int64_t count = list_slots(
      w.columns, smem.list_counts, [&](int64_t column) { return fate_of(p, w, column).candidate; },
      [&](int64_t column, bool candidate, int32_t slot) {
        if (candidate) keys[slot] = static_cast<uint64_t>(column);
      });

  Counts counts = {};
  for (int64_t column = threadIdx.x; column < p.width; column += kRowThreads) {
    const Fate fate = column < w.columns ? fate_of(p, w, column) : Fate{};
    counts.masked += fate.masked;
    counts.edited += fate.edited;
    counts.taken_back += fate.taken_back;
    if (fate.edited) p.tokens(row, w.start + column) = p.proposed(row, column);
    if (fate.taken_back) p.tokens(row, w.start + column) = p.mask_id;
    if (p.transfer_index.data != nullptr) p.transfer_index(row, column) = fate.edited;
  }
  const Key key = make_key(p, row);
  const float threshold = p.threshold[row];
  for (int64_t i = threadIdx.x; i < count; i += kRowThreads) {
    const int64_t column = static_cast<int64_t>(keys[i]);
    const float value = key(certainty(p, row, column), w.start + column);
    counts.sure += value >= threshold;
    keys[i] = sortable(value, static_cast<uint64_t>(column));
  }
  counts = sum_counts(counts, smem.warp_counts);

  const int64_t selected = p.num_select[row],
                again = counts.taken_back > 0 ? int64_t{1} + counts.taken_back : 0;
  int64_t chosen = selected > again ? selected : again;
  chosen = counts.sure > chosen ? counts.sure : chosen;
  if (chosen < count) {
    sort_keys(keys, static_cast<uint32_t>(count));
    if (threadIdx.x < kWarpSize) {
      const int64_t ordered = count_ordered(p, row, keys, count);
      if (threadIdx.x == 0) *smem.chosen = ordered > chosen ? ordered : chosen;
    }
    block_sync();
    chosen = *smem.chosen;
  }
  chosen = chosen < count ? chosen : count;

  for (int64_t i = threadIdx.x; i < chosen; i += kRowThreads) {
    const int64_t column = column_of(keys[i]);
    p.tokens(row, w.start + column) = p.proposed(row, column);
    if (p.transfer_index.data != nullptr) p.transfer_index(row, column) = 1;
  }
  if (threadIdx.x == 0) {
    const int64_t masked = int64_t{counts.masked} + counts.taken_back - chosen;
    p.num_masked[row] = static_cast<int32_t>(masked);
    p.num_transferred[row] = static_cast<int32_t>(counts.edited + chosen);
    if (p.done != nullptr && masked == 0 && counts.edited == 0) p.done[row] = 1;
  }
}

// --- host

template <class T, class Element>
Matrix<T> matrix(const Tensor& tensor) {
  return {tensor.ptr<Element>(), tensor.stride[0], tensor.stride[1]};
}

bool keys_are_shared(const UnmaskSelectArgs& args) {
  return args.proposed.shape[1] <= kSharedKeys;
}

template <bool kShared>
void run(const SelectProblem& p, int64_t batch, void* workspace, void* stream) {
  ArenaSize size;
  const SelectSmem smem(size, kShared ? p.width : 0);
  static_cast<void>(smem);
  launch("unmask_select", select_rows<kShared>, {batch}, kRowThreads, size.bytes(), stream, p,
         static_cast<uint64_t*>(workspace));
}

}  // namespace

int64_t unmask_select_workspace(const UnmaskSelectArgs& args) {
  const int64_t batch = args.proposed.shape[0], width = args.proposed.shape[1];
  return keys_are_shared(args) ? 0 : batch * width * static_cast<int64_t>(sizeof(uint64_t));
}

void unmask_select(const UnmaskSelectArgs& args, void* workspace, void* stream) {
  check_args(args);
  const int64_t batch = args.tokens.shape[0], width = args.proposed.shape[1];
  const SelectProblem p = {.tokens = matrix<int64_t, int64_t>(args.tokens),
                           .transfer_index = matrix<uint8_t, uint8_t>(args.transfer_index),
                           .num_masked = args.num_masked.ptr<int32_t>(),
                           .num_transferred = args.num_transferred.ptr<int32_t>(),
                           .done = args.done.ptr<uint8_t>(),
                           .proposed = matrix<const int64_t, int64_t>(args.proposed),
                           .confidence = matrix<const float, float>(args.confidence),
                           .entropy = matrix<const float, float>(args.entropy),
                           .editable = matrix<const uint8_t, uint8_t>(args.editable),
                           .window_start = per_row<int64_t>(args.window_start, 0),
                           .window_length = per_row<int64_t>(args.window_length, width),
                           .seed = per_row<int64_t>(args.seed, 0),
                           .step = per_row<int64_t>(args.step, 0),
                           .num_select = per_row<int32_t>(args.num_select, 0),
                           .threshold = per_row<float>(args.threshold, kNaN),
                           .factor = per_row<float>(args.factor, kNaN),
                           .entropy_bound = per_row<float>(args.entropy_bound, kNaN),
                           .temperature = per_row<float>(args.temperature, 0.0f),
                           .edit_threshold = per_row<float>(args.edit_threshold, kNaN),
                           .remask_threshold = per_row<float>(args.remask_threshold, kNaN),
                           .length = args.tokens.shape[1],
                           .width = width,
                           .mask_id = args.mask_id};
  if (keys_are_shared(args))
    run<true>(p, batch, workspace, stream);
  else
    run<false>(p, batch, workspace, stream);
}

}  // namespace esokern::cuda
