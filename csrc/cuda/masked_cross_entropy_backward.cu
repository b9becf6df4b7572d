// dlogits[row][id] = grad (e^(logit - lse) - [id is the target]) softcap'(hidden weight^T + bias), 0 in column mask_id
//   and in rows without a target; logit as in masked_cross_entropy. The columns may be a part of the vocabulary: a
//   target >= vocab is none of them. That a target is no id at all, lse says, which is NaN then.
// Work: list_gradients makes slots of the rows that have a target, clear_rows writes the others. The LM head computes
//   the logits again, tile by tile (head_tile.cuh), and makes gradients of them in registers. The two products that
//   follow, with weight and with hidden, are plain ones: the caller's.
// Memory: [rows, vocab] written once, four ids of a row at a time where its address allows, 8 lanes side by side.
//   20 bytes of scratch per row.
// Limits: f32, bf16, f16 storage; last dimensions contiguous. A row's result depends on no other row.
#include "check_rows.h"
#include "cuda/dispatch.h"
#include "cuda/head_tile.cuh"
#include "cuda/list_slots.cuh"
#include "cuda/outputs.cuh"
#include "cuda/workspace.h"
#include "ops.h"

namespace esokern::cuda {
namespace {

constexpr int kRows = 128;  // of a tile

// A row that has a target.
struct alignas(16) GradientRow {
  int32_t row, target;  // -1 = none of the columns
  float lse, grad;
};

struct GradientProblem : Columns {
  int64_t rows;
  const int64_t* targets;  // [row], like the next two
  const float *lse, *grad;
  int32_t* count;      // how many slots there are
  int32_t* row_index;  // [slot]: row of the call
  GradientRow* slots;  // [slot]
};

template <class T>
struct Gradients {
  T* data;
  int64_t stride, vocab;
  bool together;  // four ids of a row can be stored at once

  // Ids `id`, id + 1, ... of a row, as far as they exist.
  __device__ __forceinline__ void store(int64_t row, int64_t id, const Outputs<T>& four) const {
    T* to = data + row * stride + id;
    if (together && id + kColumns <= vocab) {
      store_outputs(to, four);
      return;
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (id + c < vocab) to[c] = four.value[c];
  }
};

__global__ void __launch_bounds__(kRowThreads) list_gradients(GradientProblem p) {
  Arena arena;
  int32_t* counts = arena.take<int32_t>(kListCounts);
  const int32_t slots = list_slots(
      p.rows, counts, [&](int64_t row) { return p.targets[row] >= 0; },
      [&](int64_t row, bool has_target, int32_t slot) {
        if (!has_target) return;
        const int64_t target = p.targets[row];
        p.row_index[slot] = static_cast<int32_t>(row);
        p.slots[slot] = {static_cast<int32_t>(row), target < p.vocab ? static_cast<int32_t>(target) : -1,
                         p.lse[row], p.grad[row]};
      });
  if (threadIdx.x == 0) *p.count = slots;
}

// A block per row.
template <class T>
__global__ void __launch_bounds__(kRowThreads) clear_rows(const int64_t* targets, Gradients<T> out) {
  const int64_t row = blockIdx.x;
  if (targets[row] >= 0) return;
  for (int64_t id = kColumns * threadIdx.x; id < out.vocab; id += kColumns * kRowThreads)
    out.store(row, id, {});
}

// Behind a tile of the GEMM. kSoftcap is a parameter since 128 tanh are a lot of code.
template <class T, bool kSoftcap>
class GradientEpilogue {
  using Tile = GemmTile<T, kRows>;
  static_assert(kRows * sizeof(GradientRow) <= Tile::kStageBytes && kRows == Tile::kThreads);

 public:
  __device__ __forceinline__ GradientEpilogue(const GradientProblem& p, const T* bias,
                                              const Gradients<T>& out, int64_t count)
      : p_(p), bias_(bias), out_(out), count_(count) {}

  // Thread i fetches row i.
  __device__ __forceinline__ void begin(int64_t, int64_t first) {
    const int64_t slot = first + threadIdx.x;
    if (slot < count_) row_ = p_.slots[slot];
  }

  __device__ __forceinline__ void finish(const typename Tile::Sums& sums, unsigned char* scratch,
                                         int64_t column, int64_t first) {
    GradientRow* rows = reinterpret_cast<GradientRow*>(scratch);
    const Float4 bias = HeadTile<T, kRows>::load_bias(p_, bias_, column);
    const int g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
    const int64_t id = column + threadIdx.x / kWarpSize * 32 + kColumns * g;
    const int mask = static_cast<int>(p_.mask_column - id);
    block_sync();
    rows[threadIdx.x] = row_;
    block_sync();
    if (id >= p_.vocab) return;
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
      const int row = 8 * (i / 2) + 2 * t + i % 2;
      if (first + row >= count_) return;
      const GradientRow wanted = rows[row];
      const int target = wanted.target - static_cast<int>(id);
      Outputs<T> four;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const float slope = gradient(Tile::sum(sums, i / 2, i % 2, c) + bias.value[c], wanted, c == target);
        four.value[c] = from_float<T>(c == mask ? 0.0f : slope);
      }
      out_.store(wanted.row, id, four);
    }
  }

 private:
  __device__ __forceinline__ float gradient(float logit, const GradientRow& row, bool is_target) const {
    float slope = row.grad;
    if constexpr (kSoftcap) {
      const float bent = tanhf(logit / p_.softcap);
      logit = p_.softcap * bent;
      slope *= 1.0f - bent * bent;
    }
    const float probability = exp2_fast((logit - row.lse) * kLog2E);
    return slope * (is_target ? probability - 1.0f : probability);
  }

  const GradientProblem& p_;
  const T* bias_;
  const Gradients<T>& out_;
  int64_t count_;
  GradientRow row_ = {};
};

template <class T, bool kSoftcap>
__global__ void __launch_bounds__(GemmTile<T, kRows>::kThreads, 2)
    gradient_head(GradientProblem p, GemmProblem<T> gemm, const T* bias, Gradients<T> out) {
  Arena arena;
  unsigned char* stages = arena.take<unsigned char>(GemmTile<T, kRows>::kSharedBytes, 1024);
  gemm.rows = *p.count;
  GradientEpilogue<T, kSoftcap> epilogue(p, bias, out, gemm.rows);
  gemm_tiles<T, kRows>(gemm, stages, epilogue);
}

// --- host

// Hands out the workspace, or measures it.
template <class Source>
void take_scratch(GradientProblem* p, Source& source) {
  p->count = source.template take<int32_t>(1);
  p->row_index = source.template take<int32_t>(p->rows);
  p->slots = source.template take<GradientRow>(p->rows);
}

template <class T>
void run(const MaskedCrossEntropyBackwardArgs& args, void* workspace, void* stream) {
  using Tile = GemmTile<T, kRows>;
  GradientProblem p = {};
  static_cast<Columns&>(p) = make_columns(args.weight.shape[0], 0, args.mask_id, args.logit_softcap);
  p.rows = args.hidden.shape[0];
  p.targets = args.targets.ptr<int64_t>();
  p.lse = args.lse.ptr<float>();
  p.grad = args.grad.ptr<float>();
  Workspace scratch(workspace);
  take_scratch(&p, scratch);
  const GemmProblem<T> gemm = head_gemm<T>(args.hidden, args.weight, p.shift, p.row_index);
  T* dlogits = args.dlogits.ptr<T>();
  const int64_t stride = args.dlogits.stride[0];
  const Gradients<T> out{dlogits, stride, p.vocab, moves_together(dlogits, stride)};
  launch("list_gradients", list_gradients, {1}, kRowThreads, kListCounts * sizeof(int32_t), stream, p);
  launch("clear_rows", clear_rows<T>, {p.rows}, kRowThreads, 0, stream, p.targets, out);
  launch("gradient_head", p.softcap > 0.0f ? gradient_head<T, true> : gradient_head<T, false>,
         {Tile::blocks(gemm)}, Tile::kThreads, Tile::kSharedBytes, stream, p, gemm, args.bias.ptr<T>(), out);
}

}  // namespace

int64_t masked_cross_entropy_backward_workspace(const MaskedCrossEntropyBackwardArgs& args) {
  GradientProblem p = {};
  p.rows = args.hidden.shape[0];
  ArenaSize size;
  take_scratch(&p, size);
  return size.bytes();
}

void masked_cross_entropy_backward(const MaskedCrossEntropyBackwardArgs& args, void* workspace,
                                   void* stream) {
  check_args(args);
  ESOKERN_CHECK(args.hidden.shape[0] <= INT32_MAX, "masked_cross_entropy_backward: at most 2^31 - 1 rows",
                args.hidden.shape[0]);
  if (args.hidden.shape[0] == 0) return;
  dispatch_dtype(args.hidden.dtype, [&]<class T>() { run<T>(args, workspace, stream); });
}

}  // namespace esokern::cuda
