// lse = log sum over ids of e^logit, target_logit = logit of the row's target; logit = softcap(hidden weight^T + bias),
//   -inf in column mask_id.
// Work: list_targets makes slots of the rows that have a target and finishes the others. The tiles of the LM head
//   (head_tile.cuh) are reduced as unmask_sample reduces them, so that lse has its bits, and the tile with the target
//   keeps its logit. finish_log_sums merges the tiles of a row in one order.
// Memory: weight is read from memory once per batch of rows; blocks at work on other rows find its tiles in L2. Logits
//   exist in shared memory alone; 8 bytes per row and 128 ids pass between the kernels.
// Limits: f32, bf16, f16 storage; last dimensions contiguous. A row's result depends on no other row.
// Head and log-sum-exp in one pass: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024.
#include "check_rows.h"
#include "cuda/dispatch.h"
#include "cuda/head_tile.cuh"
#include "cuda/list_slots.cuh"
#include "cuda/workspace.h"
#include "ops.h"

namespace esokern::cuda {
namespace {

constexpr int64_t kBatchRows = 4096;
constexpr int kRows = 128;  // of a tile

// Rows first_row, first_row + 1, ... of a call.
struct LossProblem : Columns {
  int64_t first_row, rows;
  const int64_t* targets;  // [row], like the outputs
  float *lse, *target_logit;
  int32_t* count;         // how many slots there are
  int32_t* row_index;     // [slot]: row of the call
  int32_t* slot_targets;  // [slot]
  float* slot_logits;     // [slot]: of its target
  LogSum* states;         // [slot][tile]
};

__global__ void __launch_bounds__(kRowThreads) list_targets(LossProblem p) {
  Arena arena;
  int32_t* counts = arena.take<int32_t>(kListCounts);
  const int32_t slots = list_slots(
      p.rows, counts,
      [&](int64_t i) {
        const int64_t target = p.targets[p.first_row + i];
        return target >= 0 && target < p.vocab;
      },
      [&](int64_t i, bool has_target, int32_t slot) {
        const int64_t row = p.first_row + i, target = p.targets[row];
        if (has_target) {
          p.row_index[slot] = static_cast<int32_t>(row);
          p.slot_targets[slot] = static_cast<int32_t>(target);
        } else {
          p.lse[row] = p.target_logit[row] = target < 0 ? 0.0f : __builtin_nanf("");
        }
      });
  if (threadIdx.x == 0) *p.count = slots;
}

// Behind a tile of the GEMM.
template <class T>
class LogSumEpilogue {
  using Tile = GemmTile<T, kRows>;
  using Head = HeadTile<T, kRows>;
  static_assert(Head::kBytes + kRows * sizeof(int32_t) <= Tile::kStageBytes && kRows == Tile::kThreads);

 public:
  __device__ __forceinline__ LogSumEpilogue(const LossProblem& p, const T* bias, int64_t count)
      : p_(p), bias_(bias), count_(count) {}

  // Thread i fetches the target of row i.
  __device__ __forceinline__ void begin(int64_t, int64_t first) {
    const int64_t slot = first + threadIdx.x;
    target_ = slot < count_ ? p_.slot_targets[slot] : -1;
  }

  __device__ __forceinline__ void finish(const typename Tile::Sums& sums, unsigned char* scratch,
                                         int64_t column, int64_t first) {
    int32_t* targets = reinterpret_cast<int32_t*>(scratch + Head::kBytes);
    const Float4 bias = Head::load_bias(p_, bias_, column);
    block_sync();
    targets[threadIdx.x] = target_;
    Head::for_rows(sums, bias, scratch, count_ - first, [&](auto tile, int line, int row) {
      const int chunk = threadIdx.x % kRowLanes;
      finish_logits(p_, tile, line, column);
      Float4 x[4];
#pragma unroll
      for (int slice = 0; slice < 4; ++slice) x[slice] = *tile.at(line, slice, chunk);
      const bool bad = is_bad(x);
      LogSum total = log_sum(x, 1.0f, nullptr);
      if (bad) total.sum = __builtin_nanf("");
      const int64_t slot = first + row;
      if (slot >= count_) return;
      if (chunk == 0) p_.states[(slot * p_.columns + column) / kTile] = total;
      const int64_t at = targets[row] - column;
      if (at >= 0 && at < kTile && at % 32 / 4 == chunk)
        p_.slot_logits[slot] = tile.at(line, static_cast<int>(at / 32), chunk)->value[at % 4];
    });
  }

 private:
  const LossProblem& p_;
  const T* bias_;
  int64_t count_;
  int32_t target_ = -1;
};

template <class T>
__global__ void __launch_bounds__(GemmTile<T, kRows>::kThreads, 2)
    log_sum_head(LossProblem p, GemmProblem<T> gemm, const T* bias) {
  Arena arena;
  unsigned char* stages = arena.take<unsigned char>(GemmTile<T, kRows>::kSharedBytes, 1024);
  gemm.rows = *p.count;
  LogSumEpilogue<T> epilogue(p, bias, gemm.rows);
  gemm_tiles<T, kRows>(gemm, stages, epilogue);
}

// A block per slot.
__global__ void __launch_bounds__(kRowThreads) finish_log_sums(LossProblem p) {
  Arena arena;
  LogSum* warp_state = arena.take<LogSum>(kRowThreads / kWarpSize);
  const int64_t slot = blockIdx.x, tiles = p.columns / kTile;
  if (slot >= *p.count) return;
  const LogSum total = merge_states(p.states + slot * tiles, 1, tiles, 1.0f, warp_state);
  if (threadIdx.x != 0) return;
  const int64_t row = p.row_index[slot];
  p.lse[row] = total.top + logf(total.sum);
  p.target_logit[row] = p.slot_logits[slot];
}

// --- host

int64_t batch_rows(const MaskedCrossEntropyArgs& args) {
  return args.hidden.shape[0] < kBatchRows ? args.hidden.shape[0] : kBatchRows;
}

LossProblem make_problem(const MaskedCrossEntropyArgs& args) {
  LossProblem p = {};
  static_cast<Columns&>(p) = make_columns(args.weight.shape[0], 0, args.mask_id, args.logit_softcap);
  p.targets = args.targets.ptr<int64_t>();
  p.lse = args.lse.ptr<float>();
  p.target_logit = args.target_logit.ptr<float>();
  return p;
}

// Hands out the workspace, or measures it.
template <class Source>
void take_scratch(LossProblem* p, int64_t slots, Source& source) {
  p->count = source.template take<int32_t>(1);
  p->row_index = source.template take<int32_t>(slots);
  p->slot_targets = source.template take<int32_t>(slots);
  p->slot_logits = source.template take<float>(slots);
  p->states = source.template take<LogSum>(slots * (p->columns / kTile));
}

template <class T>
void run(const MaskedCrossEntropyArgs& args, void* workspace, void* stream) {
  using Tile = GemmTile<T, kRows>;
  const int64_t total = args.hidden.shape[0], batch = batch_rows(args);
  LossProblem p = make_problem(args);
  Workspace scratch(workspace);
  take_scratch(&p, batch, scratch);
  GemmProblem<T> gemm = head_gemm<T>(args.hidden, args.weight, p.shift, p.row_index);
  for (p.first_row = 0; p.first_row < total; p.first_row += batch) {
    p.rows = gemm.rows = total - p.first_row < batch ? total - p.first_row : batch;
    launch("list_targets", list_targets, {1}, kRowThreads, kListCounts * sizeof(int32_t), stream, p);
    launch("log_sum_head", log_sum_head<T>, {Tile::blocks(gemm)}, Tile::kThreads, Tile::kSharedBytes, stream,
           p, gemm, args.bias.ptr<T>());
    launch("finish_log_sums", finish_log_sums, {p.rows}, kRowThreads,
           kRowThreads / kWarpSize * sizeof(LogSum), stream, p);
  }
}

}  // namespace

int64_t masked_cross_entropy_workspace(const MaskedCrossEntropyArgs& args) {
  LossProblem p = make_problem(args);
  ArenaSize size;
  take_scratch(&p, batch_rows(args), size);
  return size.bytes();
}

void masked_cross_entropy(const MaskedCrossEntropyArgs& args, void* workspace, void* stream) {
  check_args(args);
  ESOKERN_CHECK(args.hidden.shape[0] <= INT32_MAX, "masked_cross_entropy: at most 2^31 - 1 rows",
                args.hidden.shape[0]);
  if (args.hidden.shape[0] == 0) return;
  dispatch_dtype(args.hidden.dtype, [&]<class T>() { run<T>(args, workspace, stream); });
}

}  // namespace esokern::cuda
