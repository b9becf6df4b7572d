// token = argmax over ids of logit + temperature * gumbel(seed, position, step, id),
//   logit = softcap(hidden weight^T + bias);
//   logprob, prob, margin, entropy and lse of softmax(logit) or of what temperature and filters made of it.
// Work: list_rows finishes what is carried over and lists the rows to draw. The LM head (sample_head.cuh) reduces each of
//   its tiles at once (sample_tile.cuh) to a state of 32 bytes per row; finish_rows merges these in one order and writes
//   the results. Rows with filters need their logits again once the threshold is known (keep_prefix.cuh): the head
//   stores them, and sample_logits draws. Logits of the caller go through the same sampler, lane for lane.
// Memory: weight is read from memory once per batch of rows; blocks at work on other rows find its tiles in L2. Per row
//   32 bytes per 128 ids; with filters 4 bytes per id and 6 KB more. Rows go in batches, so that this stays bounded.
// Limits: f32, bf16, f16 storage; last dimensions contiguous; vocabulary below 2^31 - 128.
// Gumbel-max: Maddison, Tarlow, Minka, "A* Sampling", 2014; LM head with the sampler as its epilogue as in
//   FlashSampling.
#include "check_rows.h"
#include "cuda/dispatch.h"
#include "cuda/keep_prefix.cuh"
#include "cuda/per_row.cuh"
#include "cuda/sample_head.cuh"
#include "cuda/sample_rows.cuh"
#include "cuda/workspace.h"
#include "ops.h"

namespace esokern::cuda {
namespace {

constexpr int64_t kBatchRows = 1024;
constexpr int64_t kFilteredBatchRows = 256;
constexpr int kThreads = 128;

// --- logits that exist

// logits[slot or its row][column - shift], outside of [0, width) = -inf.
template <class T>
struct LogitsSource {
  const T* data;
  int64_t stride, shift, width;
  bool by_slot;
  bool aligned;  // four logits whose column is a multiple of 4 are one access
};

// A block per tile and 16 slots. Each lane fetches what it will sample from.
template <class T>
__global__ void __launch_bounds__(kThreads) sample_logits(SampleProblem p, LogitsSource<T> source) {
  constexpr int kLines = kThreads / kRowLanes;
  Arena arena;
  const LogitsTile<kLines> tile = {arena.take<unsigned char>(LogitsTile<kLines>::kBytes)};
  const int64_t count = *p.count, first = static_cast<int64_t>(blockIdx.y) * kLines;
  if (first >= count) return;
  const int line = threadIdx.x / kRowLanes, chunk = threadIdx.x % kRowLanes;
  const int64_t slot = first + line, column = static_cast<int64_t>(blockIdx.x) * kTile;
  const bool in_use = slot < count;
  const Row row = in_use ? p.rows[slot] : Row{};
  const float floor = in_use ? float_of_order(load_relaxed(p.floors + slot)) : 0.0f;
  const T* from = source.data + (!in_use ? 0 : source.by_slot ? slot : p.row_index[slot]) * source.stride;
#pragma unroll
  for (int slice = 0; slice < 4; ++slice) {
    const int64_t at = column + 32 * slice + 4 * chunk - source.shift;
    struct alignas(4 * sizeof(T)) Four {
      T value[4];
    } four = {};
    Float4 x;
    if (source.aligned && at + 4 <= source.width) {
      four = *reinterpret_cast<const Four*>(from + at);
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (at + c >= 0 && at + c < source.width) four.value[c] = from[at + c];
    }
#pragma unroll
    for (int c = 0; c < 4; ++c)
      x.value[c] = at + c >= 0 && at + c < source.width ? to_float(four.value[c]) : -kInfinity;
    *tile.at(line, slice, chunk) = x;
  }
  finish_tile(p, row, floor, in_use, tile, line, slot, column);
}

template <class T>
void launch_logits(const SampleProblem& p, const LogitsSource<T>& source, int64_t rows, void* stream) {
  constexpr int kLines = kThreads / kRowLanes;
  launch("sample_logits", sample_logits<T>, {p.columns / kTile, (rows + kLines - 1) / kLines}, kThreads,
         LogitsTile<kLines>::kBytes, stream, p, source);
}

// --- host

int64_t stride(const Tensor& tensor) {
  return tensor.given() ? tensor.stride[0] : 0;
}

bool has_filters(const UnmaskSampleArgs& args) {
  return args.top_k.given() || args.top_p.given() || args.min_p.given();
}

int64_t total_rows(const UnmaskSampleArgs& args) {
  return (args.hidden.given() ? args.hidden : args.logits).shape[0];
}

int64_t batch_rows(const UnmaskSampleArgs& args) {
  const int64_t total = total_rows(args), most = has_filters(args) ? kFilteredBatchRows : kBatchRows;
  return total < most ? total : most;
}

SampleProblem make_problem(const UnmaskSampleArgs& args) {
  SampleProblem p = {};
  p.slots = batch_rows(args);
  const int64_t vocab = args.hidden.given() ? args.weight.shape[0] : args.logits.shape[1];
  ESOKERN_CHECK(vocab < INT32_MAX - kTile, "unmask_sample: at most 2^31 - 129 ids, vocab", vocab);
  static_cast<Columns&>(p) = make_columns(vocab, args.vocab_start, args.mask_id, args.logit_softcap);
  p.first_block = static_cast<uint32_t>(args.vocab_start >> 2);
  p.wants_second = args.margin.given();
  p.wants_lse = args.logprob.given() || args.prob.given() || args.margin.given() || args.entropy.given() ||
                args.lse.given();
  p.filtered = has_filters(args);
  p.filtered_statistics = args.statistics == static_cast<int64_t>(Statistics::sampling);
  return p;
}

// Hands out the workspace, or with a null one measures it. Returns the logits of rows with filters.
template <class Source>
float* take_scratch(SampleProblem* p, Source& source) {
  p->count = source.template take<int32_t>(1);
  p->row_index = source.template take<int32_t>(p->slots);
  p->floors = source.template take<int32_t>(p->slots);
  p->rows = source.template take<Row>(p->slots);
  p->states = source.template take<State>(p->slots * (p->columns / kTile));
  if (!p->filtered) return nullptr;
  p->tops = source.template take<int32_t>(p->slots);
  p->bins = source.template take<int32_t>(p->slots * 3 * 2 * kBins);
  p->searches = source.template take<Search>(p->slots * 2);
  return source.template take<float>(p->slots * p->columns);
}

template <class T>
struct Head {
  GemmProblem<T> gemm;
  const T* bias;

  void launch_head(const SampleProblem& p, int64_t rows, void* stream) {
    gemm.rows = rows;  // at most; the grid goes by it
    const auto run = [&]<int kRows>() {
      launch("sample_head", sample_head<T, kRows>, {GemmTile<T, kRows>::blocks(gemm)},
             GemmTile<T, kRows>::kThreads, GemmTile<T, kRows>::kSharedBytes, stream, p, gemm, bias);
    };
    const int block_rows = gemm_rows(rows);
    if (block_rows == 16) return run.template operator()<16>();
    if (block_rows == 64) return run.template operator()<64>();
    return run.template operator()<128>();
  }
};

template <class T>
void run(const UnmaskSampleArgs& args, void* workspace, void* stream) {
  SampleProblem p = make_problem(args);
  Workspace scratch(workspace);
  float* const stored = take_scratch(&p, scratch);
  Rows rows = {.temperature = per_row<float>(args.temperature, 1.0f),
               .seed = per_row<int64_t>(args.seed, 0),
               .positions = per_row<int64_t>(args.positions, 0),
               .step = per_row<int64_t>(args.step, 0),
               .tokens = args.tokens.ptr<int64_t>(),
               .invalid = args.invalid.ptr<uint8_t>(),
               .logprob = args.logprob.ptr<float>(),
               .prob = args.prob.ptr<float>(),
               .margin = args.margin.ptr<float>(),
               .entropy = args.entropy.ptr<float>(),
               .lse = args.lse.ptr<float>(),
               .score = args.score.ptr<float>(),
               .ld_tokens = stride(args.tokens),
               .ld_invalid = stride(args.invalid),
               .ld_logprob = stride(args.logprob),
               .ld_prob = stride(args.prob),
               .ld_margin = stride(args.margin),
               .ld_entropy = stride(args.entropy),
               .ld_lse = stride(args.lse),
               .ld_score = stride(args.score),
               .mask_id = args.mask_id,
               .vocab_start = args.vocab_start,
               .sampling_statistics = p.filtered_statistics};
  const Filters filters = {per_row<int32_t>(args.top_k, 0), per_row<float>(args.top_p, 1.0f),
                           per_row<float>(args.min_p, 0.0f),
                           args.filter_order == static_cast<int64_t>(FilterOrder::top_k_first)};
  Head<T> head = {};
  LogitsSource<T> logits = {};
  if (args.hidden.given()) {
    head = {head_gemm<T>(args.hidden, args.weight, p.shift, p.row_index), args.bias.ptr<T>()};
  } else {
    const T* data = args.logits.ptr<T>();
    const bool aligned =
        reinterpret_cast<uintptr_t>(data) % (4 * sizeof(T)) == 0 && args.logits.stride[0] % 4 == 0;
    logits = {data, args.logits.stride[0], p.shift, p.vocab, false, aligned && p.shift == 0};
  }

  const int64_t total = total_rows(args);
  for (rows.first_row = 0; rows.first_row < total; rows.first_row += p.slots) {
    rows.count = total - rows.first_row < p.slots ? total - rows.first_row : p.slots;
    launch("list_rows", list_rows, {1}, kRowThreads, kListCounts * sizeof(int32_t), stream, p, rows);
    p.logits = stored;
    if (args.hidden.given())
      head.launch_head(p, rows.count, stream);
    else
      launch_logits(p, logits, rows.count, stream);
    if (p.filtered) {
      for (int step = 0; step < filters.steps(); ++step)
        launch("add_masses", add_masses, {(p.columns + kPart - 1) / kPart, rows.count}, kFilterThreads,
               sizeof(FilterSmem), stream, p, filters, step);
      launch("find_prefix", find_prefix, {rows.count}, kFilterThreads, sizeof(FilterSmem), stream, p,
             filters);
      SampleProblem finished = p;  // softcap is applied already
      finished.logits = nullptr;
      finished.softcap = 0.0f;
      launch_logits<float>(finished, {stored, p.columns, 0, p.columns, true, true}, rows.count, stream);
    }
    launch("finish_rows", finish_rows, {rows.count}, kRowThreads, kRowThreads / kWarpSize * sizeof(State),
           stream, p, rows);
  }
}

}  // namespace

int64_t unmask_sample_workspace(const UnmaskSampleArgs& args) {
  SampleProblem p = make_problem(args);
  ArenaSize size;
  take_scratch(&p, size);
  return size.bytes();
}

void unmask_sample(const UnmaskSampleArgs& args, void* workspace, void* stream) {
  check_args(args);
  const Tensor& source = args.hidden.given() ? args.hidden : args.logits;
  ESOKERN_CHECK(source.shape[0] <= INT32_MAX, "unmask_sample: at most 2^31 - 1 rows", source.shape[0]);
  if (source.shape[0] == 0) return;
  dispatch_dtype(source.dtype, [&]<class T>() { run<T>(args, workspace, stream); });
}

}  // namespace esokern::cuda
