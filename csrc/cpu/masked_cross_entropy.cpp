// lse[r] = log sum over v of exp(logit[r][v]), target_logit[r] = logit[r][target of r], and their gradient
//   dlogits[r][v] = grad[r] (exp(logit[r][v] - lse[r]) - [v is the target of r]) softcap'(..),
//   logit = softcap(hidden weight^T + bias), softcap' = 1 - (logit / softcap)^2.
// Work: a task is a chunk of 512 columns of the vocabulary for 256 of the rows that have a target: tiles of 128
//   columns x 16 rows through rows_gemm.h, reduced at once or turned into gradients. Chunks merge in ascending
//   order by the code of unmask_sample, so lse has its bits, and neither threads nor other rows change a bit of a
//   row. Rows without a target cost their zeros.
// Memory: a tile of weight, 128 x hidden_size, stays in L2 while the rows of a task pass, logits exist as a tile
//   of 16 x 144 floats per thread; 8 bytes per row, and 8 per row and chunk for the partial results.
// Limits: f32, bf16, f16 storage, accumulation in float; last dimensions contiguous; vocabulary below 2^31 - 129.
// The gradient from lse alone, with the logits computed again: Wijmans et al., "Cut Your Losses in
//   Large-Vocabulary Language Models", arXiv 2411.09009, section 4.
#include <string.h>

#include "check_rows.h"
#include "cpu/dispatch_dtype.h"
#include "cpu/head_tile.h"
#include "cpu/parallel.h"
#include "cpu/rows_gemm.h"
#include "cpu/sample_tile.h"
#include "cpu/scratch.h"
#include "ops.h"

namespace esokern::cpu::ESOKERN_ISA {
namespace {

constexpr int64_t kTaskRows = 256;
constexpr int kTileStride = kTile + kGemmStrip;  // rows_gemm rounds up to whole strips

// One direction of a call as its tasks see it.
template <class T, class Args>
struct Head {
  const Args& args;
  const int64_t* targets;
  int64_t vocab;
  Scratch<int64_t> live;  // the rows that have a target, in order
  int64_t num_live = 0;

  explicit Head(const Args& call)
      : args(call),
        targets(call.targets.template ptr<int64_t>()),
        vocab(call.weight.shape[0]),
        live(call.hidden.shape[0]) {
    for (int64_t r = 0; r < args.hidden.shape[0]; ++r)
      if (targets[r] >= 0) live.data[num_live++] = r;
  }

  int64_t chunks() const { return (vocab + kChunk - 1) / kChunk; }

  // body(chunk, first, count): a task is live rows [first, first + count) and a chunk of the columns.
  template <class Body>
  void for_each_task(const Body& body) const {
    const int64_t blocks = (num_live + kTaskRows - 1) / kTaskRows;
    parallel_for(chunks() * blocks, [&](int64_t task) {
      const int64_t first = task % blocks * kTaskRows;
      body(task / blocks, first, num_live - first < kTaskRows ? num_live - first : kTaskRows);
    });
  }

  // body(i, row, column, width, logits) for every row of a task, which is its i-th, and every tile of the chunk:
  // the logits of ids [column, column + width), behind them -inf up to kTile.
  template <class Body>
  void for_each_tile(int64_t chunk, int64_t first, int64_t count, const Body& body) const {
    const int64_t end = (chunk + 1) * kChunk < vocab ? (chunk + 1) * kChunk : vocab;
    for (int64_t column = chunk * kChunk; column < end; column += kTile) {
      const int64_t width = end - column < kTile ? end - column : kTile;
      for (int64_t i = 0; i < count; i += kGemmRows) {
        const int64_t* rows = live.data + first + i;
        const int height = static_cast<int>(count - i < kGemmRows ? count - i : kGemmRows);
        alignas(64) float tile[kGemmRows * kTileStride];
        logits(rows, height, column, width, tile);
        for (int r = 0; r < height; ++r) body(i + r, rows[r], column, width, tile + r * kTileStride);
      }
    }
  }

  void logits(const int64_t* rows, int height, int64_t column, int64_t width, float* tile) const {
    const T* from[kGemmRows];
    for (int r = 0; r < height; ++r)
      from[r] = static_cast<const T*>(args.hidden.data) + rows[r] * args.hidden.stride[0];
    rows_gemm(from, height, static_cast<const T*>(args.weight.data), args.weight.stride[0], column,
              column + width, args.hidden.shape[1], tile, kTileStride);
    const T* bias = args.bias.given() ? static_cast<const T*>(args.bias.data) + column : nullptr;
    for (int r = 0; r < height; ++r) {
      float* row = tile + r * kTileStride;
      finish_logits(row, width, bias, args.logit_softcap);
      for (int64_t i = width; i < kTile; ++i) row[i] = -kInfinity;
      if (args.mask_id >= column && args.mask_id < column + width) row[args.mask_id - column] = -kInfinity;
    }
  }
};

// What is known about a row after one chunk; top is NaN if a logit was NaN or +inf.
struct Partial {
  float top, sum;
};

State state_of(const Partial& partial) {
  State state;
  state.bad = partial.top != partial.top;
  state.top = partial.top;
  state.sum = partial.sum;
  return state;
}

template <class T>
void forward(const MaskedCrossEntropyArgs& args) {
  const Head<T, MaskedCrossEntropyArgs> head(args);
  float* const lse = args.lse.ptr<float>();
  float* const target_logit = args.target_logit.ptr<float>();
  for (int64_t r = 0; r < args.hidden.shape[0]; ++r) {
    ESOKERN_CHECK(head.targets[r] < head.vocab, "masked_cross_entropy: targets: an id must be < vocab",
                  head.targets[r]);
    if (head.targets[r] < 0) lse[r] = target_logit[r] = 0.0f;
  }

  const Scratch<Partial> partials(head.chunks() * head.num_live);
  head.for_each_task([&](int64_t chunk, int64_t first, int64_t count) {
    State states[kTaskRows];
    head.for_each_tile(chunk, first, count,
                       [&](int64_t i, int64_t row, int64_t column, int64_t width, const float* logits) {
                         lse_tile(logits, states + i);
                         const int64_t target = head.targets[row] - column;
                         if (target >= 0 && target < width) target_logit[row] = logits[target];
                       });
    Partial* const out = partials.data + chunk * head.num_live + first;
    for (int64_t i = 0; i < count; ++i)
      out[i] = {states[i].bad ? __builtin_nanf("") : states[i].top, states[i].sum};
  });

  parallel_for((head.num_live + kTaskRows - 1) / kTaskRows, [&](int64_t block) {
    for (int64_t i = block * kTaskRows; i < head.num_live && i < (block + 1) * kTaskRows; ++i) {
      State state = state_of(partials.data[i]);
      for (int64_t chunk = 1; chunk < head.chunks(); ++chunk)
        merge(&state, state_of(partials.data[chunk * head.num_live + i]), 1.0f);
      const bool finite = !state.bad && state.top > -kInfinity;
      lse[head.live.data[i]] = state.bad ? __builtin_nanf("")
                               : finite  ? state.top + logf(state.sum)
                                         : -kInfinity;
    }
  });
}

// One row of a tile, logits to gradients, in place. target: its place in the tile, if it is there.
void differentiate(float* row, int64_t width, float lse, float grad, float softcap, int64_t target) {
  const auto slope = [&](Vec logit) {
    const Vec ratio = logit / splat(softcap);
    return softcap > 0.0f ? splat(1.0f) - ratio * ratio : splat(1.0f);
  };
  const bool here = target >= 0 && target < width;
  const float of_target = here ? grad * slope(splat(row[target]))[0] : 0.0f;
  for (int64_t i = 0; i < width; i += kWidth) {
    const Vec logit = load(row + i);
    store(row + i, splat(grad) * exp(logit - splat(lse)) * slope(logit));
  }
  if (here) row[target] -= of_target;
}

template <class T>
void store_row(const float* values, int64_t count, T* out) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store_as(out + i, load(values + i));
  for (; i < count; ++i) from_float(values[i], out + i);
}

template <class T>
void backward(const MaskedCrossEntropyBackwardArgs& args) {
  const Head<T, MaskedCrossEntropyBackwardArgs> head(args);
  T* const dlogits = args.dlogits.ptr<T>();
  const float* const lse = args.lse.ptr<float>();
  const float* const grad = args.grad.ptr<float>();
  const int64_t rows = args.hidden.shape[0], ld_out = args.dlogits.stride[0];
  parallel_for((rows + kTaskRows - 1) / kTaskRows, [&](int64_t block) {
    for (int64_t r = block * kTaskRows; r < rows && r < (block + 1) * kTaskRows; ++r)
      if (head.targets[r] < 0) memset(dlogits + r * ld_out, 0, static_cast<size_t>(head.vocab) * sizeof(T));
  });
  head.for_each_task([&](int64_t chunk, int64_t first, int64_t count) {
    head.for_each_tile(
        chunk, first, count, [&](int64_t, int64_t row, int64_t column, int64_t width, float* logits) {
          differentiate(logits, width, lse[row], grad[row], args.logit_softcap, head.targets[row] - column);
          if (args.mask_id >= column && args.mask_id < column + width) logits[args.mask_id - column] = 0.0f;
          store_row(logits, width, dlogits + row * ld_out + column);
        });
  });
}

}  // namespace

void masked_cross_entropy(const MaskedCrossEntropyArgs& args) {
  check_args(args);
  dispatch_dtype(args.hidden.dtype, [&](auto type) { forward<decltype(type)>(args); });
}

void masked_cross_entropy_backward(const MaskedCrossEntropyBackwardArgs& args) {
  check_args(args);
  dispatch_dtype(args.hidden.dtype, [&](auto type) { backward<decltype(type)>(args); });
}

}  // namespace esokern::cpu::ESOKERN_ISA
