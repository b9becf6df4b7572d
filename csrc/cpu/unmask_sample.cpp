// token = argmax over ids of logit + temperature * gumbel(seed, position, step, id),
//   logit = softcap(hidden weight^T + bias);
//   logprob, prob, margin, entropy and lse of softmax(logit) or of what temperature and filters made of it.
// Work: a task is a fixed chunk of 512 columns of the vocabulary for all rows: tiles of 128 columns x 16 rows
//   through rows_gemm.h, reduced at once by sample_tile.h. Chunk results merge in ascending order, so neither
//   threads nor other rows change a bit of a row. Rows whose token is not mask_id cost nothing.
// Memory: weight is read once for all rows (a tile of it, 128 x hidden_size, stays in L2 while the rows pass),
//   logits exist as a tile of 16 x 144 floats per thread; 32 bytes per row and chunk for the partial results.
//   Rows with filters need their logits again once the threshold is known (keep_prefix.h): they go in batches
//   of 16 with one scratch of 16 x vocab floats, and read weight once per batch.
// Limits: f32, bf16, f16 storage; last dimensions contiguous; vocabulary below 2^31 - 128.
// Gumbel-max: Maddison, Tarlow, Minka, "A* Sampling", 2014; LM head with the sampler as its epilogue as in
//   FlashSampling.
#include "check_rows.h"
#include "cpu/dispatch_dtype.h"
#include "cpu/head_tile.h"
#include "cpu/keep_prefix.h"
#include "cpu/parallel.h"
#include "cpu/rows_gemm.h"
#include "cpu/sample_tile.h"
#include "cpu/scratch.h"
#include "ops.h"

namespace esokern::cpu::ESOKERN_ISA {
namespace {

constexpr int kTileStride = kTile + kGemmStrip;  // rows_gemm rounds up to whole strips

// The call as the tasks see it.
template <class T>
struct Call {
  const UnmaskSampleArgs& args;
  bool has_hidden;
  int64_t vocab, depth;
  int64_t shift;    // column of weight's first row: vocab_start & 3
  int64_t columns;  // shift + vocab rounded up to whole tiles
  int64_t mask_column;
  Wanted wanted;

  // Logits of up to 16 rows for the tile at `column`: out[r * kTileStride + i], -inf where there is no id to
  // draw.
  void logits(const Row* rows, int count, int64_t column, float* out) const {
    const int64_t begin = column > shift ? column - shift : 0;
    const int64_t end = column + kTile - shift < vocab ? column + kTile - shift : vocab;
    const int64_t offset = begin + shift - column, width = end - begin;
    if (has_hidden) {
      const T* from[kGemmRows];
      for (int r = 0; r < count; ++r)
        from[r] = static_cast<const T*>(args.hidden.data) + rows[r].index * args.hidden.stride[0];
      rows_gemm(from, count, static_cast<const T*>(args.weight.data), args.weight.stride[0], begin, end,
                depth, out + offset, kTileStride);
    }
    const T* bias = args.bias.given() ? static_cast<const T*>(args.bias.data) + begin : nullptr;
    for (int r = 0; r < count; ++r) {
      float* row = out + r * kTileStride;
      if (!has_hidden)
        copy(static_cast<const T*>(args.logits.data) + rows[r].index * args.logits.stride[0] + begin, width,
             row + offset);
      finish_logits(row + offset, width, bias, args.logit_softcap);
      for (int64_t i = 0; i < offset; ++i) row[i] = -kInfinity;
      for (int64_t i = offset + width; i < kTile; ++i) row[i] = -kInfinity;
      if (mask_column >= column && mask_column < column + kTile) row[mask_column - column] = -kInfinity;
    }
  }

  static void copy(const T* from, int64_t count, float* to) {  // may write up to a whole Vec
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(to + i, load(from + i));
    if (i < count) store(to + i, load_partial(from + i, static_cast<int>(count - i)));
  }
};

template <class T>
T at(const Tensor& tensor, int64_t i, T otherwise) {
  return tensor.given() ? tensor.ptr<T>()[i * tensor.stride[0]] : otherwise;
}
void put(const Tensor& tensor, int64_t i, float value) {
  if (tensor.given()) tensor.ptr<float>()[i * tensor.stride[0]] = value;
}

void write_carried(const UnmaskSampleArgs& args, int64_t i) {  // a token that is there already is certain
  put(args.logprob, i, 0.0f);
  put(args.prob, i, 1.0f);
  put(args.margin, i, 1.0f);
  put(args.entropy, i, 0.0f);
  put(args.lse, i, 0.0f);
  put(args.score, i, kInfinity);
  args.invalid.ptr<uint8_t>()[i * args.invalid.stride[0]] = 0;
}

void write_row(const UnmaskSampleArgs& args, int64_t shift, const Row& row, const State& state) {
  const int64_t i = row.index;
  const float nan = __builtin_nanf("");
  const bool invalid = state.bad || !(state.score > -kInfinity);
  args.invalid.ptr<uint8_t>()[i * args.invalid.stride[0]] = invalid ? 1 : 0;
  if (invalid) {
    put(args.logprob, i, nan);
    put(args.prob, i, nan);
    put(args.margin, i, nan);
    put(args.entropy, i, nan);
    put(args.lse, i, state.bad ? nan : -kInfinity);
    put(args.score, i, state.bad ? nan : -kInfinity);
    return;
  }
  args.tokens.ptr<int64_t>()[i * args.tokens.stride[0]] = args.vocab_start + state.column - shift;
  put(args.score, i, state.score);
  const float log_sum = logf(state.sum);  // of a sum that is at least 1
  const float logprob = (state.logit - state.top) * row.scale - log_sum;
  put(args.logprob, i, logprob);
  put(args.prob, i, expf(logprob));
  put(args.margin, i, (1.0f - expf((state.second - state.top) * row.scale)) / state.sum);
  put(args.entropy, i, log_sum - state.weighted / state.sum);
  put(args.lse, i, state.top * row.scale + log_sum);
}

template <class T>
void sample_rows(const Call<T>& call, const Row* rows, int64_t count, float* floors, State* states) {
  const uint32_t first_block = static_cast<uint32_t>(call.args.vocab_start >> 2);
  const int64_t chunks = (call.columns + kChunk - 1) / kChunk;
  parallel_for(chunks, [&](int64_t chunk) {
    State* state = states + chunk * count;
    for (int64_t r = 0; r < count; ++r) state[r] = State();
    const int64_t end = (chunk + 1) * kChunk < call.columns ? (chunk + 1) * kChunk : call.columns;
    for (int64_t column = chunk * kChunk; column < end; column += kTile) {
      for (int64_t r = 0; r < count; r += kGemmRows) {
        const int height = static_cast<int>(count - r < kGemmRows ? count - r : kGemmRows);
        alignas(64) float tile[kGemmRows * kTileStride];
        call.logits(rows + r, height, column, tile);
        for (int i = 0; i < height; ++i)
          sample_tile(rows[r + i], tile + i * kTileStride, column, first_block, call.wanted, floors + r + i,
                      state + r + i);
      }
    }
  });
}

// At most 16 rows with filters; logits: [16, columns].
template <class T>
void sample_filtered_rows(const Call<T>& call, Row* rows, int count, float* logits, float* floors,
                          State* states) {
  const UnmaskSampleArgs& args = call.args;
  const uint32_t first_block = static_cast<uint32_t>(args.vocab_start >> 2);
  const int64_t chunks = (call.columns + kChunk - 1) / kChunk;
  const auto tiles = [&](int64_t chunk, const auto& body) {
    const int64_t end = (chunk + 1) * kChunk < call.columns ? (chunk + 1) * kChunk : call.columns;
    for (int64_t column = chunk * kChunk; column < end; column += kTile) body(column);
  };
  parallel_for(chunks, [&](int64_t chunk) {
    tiles(chunk, [&](int64_t column) {
      alignas(64) float tile[kGemmRows * kTileStride];
      call.logits(rows, count, column, tile);
      for (int r = 0; r < count; ++r)
        memcpy(logits + r * call.columns + column, tile + r * kTileStride, kTile * sizeof(float));
    });
  });
  parallel_for(count, [&](int64_t r) {
    Histogram bins;
    Row* row = rows + r;
    find_prefix(logits + r * call.columns, call.columns, at<int32_t>(args.top_k, row->index, 0),
                at<float>(args.top_p, row->index, 1.0f), at<float>(args.min_p, row->index, 0.0f),
                args.filter_order == static_cast<int64_t>(FilterOrder::top_k_first), &bins, row);
  });
  parallel_for(chunks, [&](int64_t chunk) {
    State* state = states + chunk * count;
    for (int r = 0; r < count; ++r) state[r] = State();
    tiles(chunk, [&](int64_t column) {
      for (int r = 0; r < count; ++r)
        sample_tile(rows[r], logits + r * call.columns + column, column, first_block, call.wanted, floors + r,
                    state + r);
    });
  });
}

template <class T>
void launch(const UnmaskSampleArgs& args) {
  const Tensor& source = args.hidden.given() ? args.hidden : args.logits;
  const int64_t total = source.shape[0];
  const bool sampling = args.statistics == static_cast<int64_t>(Statistics::sampling);
  Call<T> call = {.args = args,
                  .has_hidden = args.hidden.given(),
                  .vocab = args.hidden.given() ? args.weight.shape[0] : args.logits.shape[1],
                  .depth = args.hidden.given() ? args.hidden.shape[1] : 0,
                  .shift = args.vocab_start & 3,
                  .columns = 0,
                  .mask_column = -1,
                  .wanted = {.lse = args.logprob.given() || args.prob.given() || args.margin.given() ||
                                    args.entropy.given() || args.lse.given(),
                             .entropy = args.entropy.given(),
                             .second = args.margin.given(),
                             .filtered_statistics = sampling}};
  ESOKERN_CHECK(call.vocab < INT32_MAX - kTile, "unmask_sample: at most 2^31 - 129 ids, vocab", call.vocab);
  call.columns = (call.shift + call.vocab + kTile - 1) / kTile * kTile;
  if (args.mask_id >= args.vocab_start && args.mask_id < args.vocab_start + call.vocab)
    call.mask_column = args.mask_id - args.vocab_start + call.shift;

  // Rows to draw: plain ones from the front, filtered ones behind them.
  const Scratch<Row> rows(total);
  int64_t plain = 0, filtered = 0;
  for (int64_t i = 0; i < total; ++i) {
    if (args.mask_id >= 0 && at<int64_t>(args.tokens, i, 0) != args.mask_id) {
      write_carried(args, i);
      continue;
    }
    const float temperature = at<float>(args.temperature, i, 1.0f);
    const float inverse = sampling && temperature > 0.0f ? 1.0f / temperature : 1.0f;
    const uint64_t seed = static_cast<uint64_t>(at<int64_t>(args.seed, i, 0));
    const Row row = {.index = i,
                     .temperature = temperature,
                     .scale = inverse < kLargest ? inverse : kLargest,
                     .key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
                     .position = static_cast<uint32_t>(at<int64_t>(args.positions, i, 0)),
                     .step = static_cast<uint32_t>(at<int64_t>(args.step, i, 0)),
                     .filtered = false,
                     .threshold = -kInfinity,
                     .last_tie = INT32_MAX};
    const bool filters = at<int32_t>(args.top_k, i, 0) > 0 || at<float>(args.top_p, i, 1.0f) < 1.0f ||
                         at<float>(args.min_p, i, 0.0f) > 0.0f;
    if (filters)
      rows.data[total - ++filtered] = row;
    else
      rows.data[plain++] = row;
  }

  const int64_t chunks = (call.columns + kChunk - 1) / kChunk;
  const int64_t batch = filtered < kGemmRows ? filtered : kGemmRows;
  const Scratch<State> states(chunks * (plain > batch ? plain : batch));
  const Scratch<float> floors(total);
  for (int64_t i = 0; i < total; ++i) floors.data[i] = -kInfinity;
  const Scratch<float> logits(batch * call.columns);
  const auto finish = [&](const Row* part, int64_t count) {
    parallel_for((count + 15) / 16, [&](int64_t block) {
      for (int64_t r = block * 16; r < count && r < (block + 1) * 16; ++r) {
        State state = states.data[r];
        for (int64_t chunk = 1; chunk < chunks; ++chunk)
          merge(&state, states.data[chunk * count + r], part[r].scale);
        write_row(args, call.shift, part[r], state);
      }
    });
  };
  if (plain > 0) {
    sample_rows(call, rows.data, plain, floors.data, states.data);
    finish(rows.data, plain);
  }
  for (int64_t r = total - filtered; r < total; r += kGemmRows) {
    const int count = static_cast<int>(total - r < kGemmRows ? total - r : kGemmRows);
    sample_filtered_rows(call, rows.data + r, count, logits.data, floors.data + r, states.data);
    finish(rows.data + r, count);
  }
}

}  // namespace

void unmask_sample(const UnmaskSampleArgs& args) {
  check_args(args);
  const Tensor& source = args.hidden.given() ? args.hidden : args.logits;
  dispatch_dtype(source.dtype, [&](auto type) { launch<decltype(type)>(args); });
}

}  // namespace esokern::cpu::ESOKERN_ISA
