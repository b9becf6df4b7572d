// Which proposals of a denoising step to keep: candidates in order of falling key, the first n of them chosen, n the
//   largest of what the options give (ops.h states them), and the text, counts and flags updated.
// Work: a row is one pass over its window, then a binary heap of its candidates, from which only as many are taken as
//   are chosen, or as a rule looks at: O(width + n log width). Nothing is ordered where all are chosen, or all of at
//   least a threshold. Rows share threads where there is enough to share.
// Memory: 8 bytes of scratch per column and thread: key and column in one integer, so that equal keys go by column.
// Limits: width below 2^31 - 1. A window outside of the text is refused before anything is written.
// Sources: LLaDA (arXiv 2502.09992), Fast-dLLM (2505.22618), entropy-bounded unmasking (2505.24857), token editing as in
//   LLaDA2.1; the random choice is Gumbel-top-k (Kool, van Hoof, Welling, 2019).
#include "check_select.h"
#include "common/gumbel.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"
#include "ops.h"

namespace esokern::cpu::ESOKERN_ISA {
namespace {

constexpr int64_t kTaskColumns = 1 << 15;  // fewer are not worth a thread
constexpr float kInfinity = __builtin_inff();
constexpr float kOff = __builtin_nanf("");  // of an option: no comparison with it holds

// The value of row b, or `otherwise` if the option was not given.
template <class T>
T at(const Tensor& tensor, int64_t b, T otherwise) {
  return tensor.given() ? tensor.ptr<T>()[b] : otherwise;
}

// A row of a matrix.
template <class T>
struct RowOf {
  T* data;
  int64_t stride;
  RowOf(const Tensor& t, int64_t b, int64_t column = 0)
      : data(t.given() ? t.ptr<T>() + b * t.stride[0] + column * t.stride[1] : nullptr),
        stride(t.stride[1]) {}
  T& operator[](int64_t c) const { return data[c * stride]; }
};

// Smaller for a larger float; -0 and +0 are equal.
inline uint32_t falling(float x) {
  const uint32_t bits = Scalar::bits(x + 0.0f);
  return bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
}

// Candidates of a row, smallest first: falling key above, column below.
struct Heap {
  uint64_t* entries;  // the heap, and behind it what was taken, the first one last
  int64_t count;
  int64_t taken = 0;

  void sink(int64_t i, int64_t size) {
    const uint64_t moving = entries[i];
    for (int64_t child = 2 * i + 1; child < size; child = 2 * i + 1) {
      if (child + 1 < size) child += entries[child + 1] < entries[child];
      if (entries[child] > moving) break;
      entries[i] = entries[child];
      i = child;
    }
    entries[i] = moving;
  }

  // The best of those not taken yet, of which there is one.
  uint64_t take() {
    if (taken == 0)
      for (int64_t i = count / 2; i-- > 0;) sink(i, count);
    const int64_t last = count - ++taken;
    const uint64_t best = entries[0];
    entries[0] = entries[last];
    entries[last] = best;
    sink(0, last);
    return best;
  }

  // The n-th best, n >= 1.
  uint64_t nth(int64_t n) {
    while (taken < n) take();
    return entries[count - n];
  }
};

// One row of the call.
struct Row {
  const UnmaskSelectArgs& args;
  int64_t b, start, width;
  int64_t* tokens;  // of the window
  RowOf<int64_t> proposed;
  RowOf<float> confidence;
  RowOf<uint8_t> transfer;

  Row(const UnmaskSelectArgs& args, int64_t b)
      : args(args),
        b(b),
        start(at<int64_t>(args.window_start, b, 0)),
        width(at(args.window_length, b, args.proposed.shape[1])),
        tokens(args.tokens.ptr<int64_t>() + b * args.tokens.shape[1] + start),
        proposed(args.proposed, b),
        confidence(args.confidence, b),
        transfer(args.transfer_index, b) {}

  float certainty(int64_t c) const {
    const float x = confidence[c];
    return x != x ? -kInfinity : x;
  }

  void choose(int64_t c) const {
    tokens[c] = proposed[c];
    if (transfer.data != nullptr) transfer[c] = 1;
  }

  // Edits and masks again what the options say, and lists the columns of candidates.
  int64_t collect(uint64_t* columns, int64_t* masked, int64_t* edited, int64_t* taken_back) const {
    const int64_t mask_id = args.mask_id;
    const float edit_threshold = at(args.edit_threshold, b, kOff);
    const float remask_threshold = at(args.remask_threshold, b, kOff);
    const bool may_change = edit_threshold == edit_threshold || remask_threshold == remask_threshold;
    const RowOf<uint8_t> editable(args.editable, b, start);
    int64_t count = 0;
    for (int64_t c = 0; c < width; ++c) {
      const int64_t old = tokens[c], drawn = proposed[c];
      bool candidate = old == mask_id;
      *masked += candidate;
      if (may_change && !candidate && (editable.data == nullptr || editable[c] != 0)) {
        const float sure = confidence[c];
        if (drawn != old && drawn != mask_id && sure >= edit_threshold) {
          choose(c);
          ++*edited;
        } else if (sure < remask_threshold) {
          tokens[c] = mask_id;
          candidate = true;
          ++*taken_back;
        }
      }
      columns[count] = static_cast<uint64_t>(c);
      count += candidate && drawn != mask_id;
    }
    return count;
  }

  // Puts the keys above the columns of `entries`. Returns how many keys reach the threshold.
  int64_t set_keys(uint64_t* entries, int64_t count, float threshold) const {
    const float temperature = at(args.temperature, b, 0.0f);
    const uint64_t seed = static_cast<uint64_t>(at<int64_t>(args.seed, b, 0));
    const uint32_t step = static_cast<uint32_t>(at<int64_t>(args.step, b, 0));
    const uint32_t first = static_cast<uint32_t>(start);
    int64_t reached = 0;
    for (int64_t i = 0; i < count; i += kWidth) {
      const int lanes = static_cast<int>(count - i < kWidth ? count - i : kWidth);
      float keys[kWidth];
      for (int j = 0; j < lanes; ++j) keys[j] = certainty(static_cast<int64_t>(entries[i + j]));
      if (temperature > 0.0f) {
        uint32_t positions[kWidth] = {};
        for (int j = 0; j < lanes; ++j) positions[j] = first + static_cast<uint32_t>(entries[i + j]);
        float noise[kWidth];
        store(noise,
              selection_gumbel<NoiseVec>(load(positions), splat(step), splat(static_cast<uint32_t>(seed)),
                                         splat(static_cast<uint32_t>(seed >> 32))));
        for (int j = 0; j < lanes; ++j)
          keys[j] = temperature == kInfinity ? noise[j] : keys[j] / temperature + noise[j];
      }
      for (int j = 0; j < lanes; ++j) {
        reached += keys[j] >= threshold;
        entries[i + j] |= static_cast<uint64_t>(falling(keys[j])) << 32;
      }
    }
    return reached;
  }

  // What the rules that follow the order choose: factor and entropy_bound, NaN = off.
  int64_t count_ordered(Heap* heap, float factor, float entropy_bound) const {
    const RowOf<float> entropy(args.entropy, b);
    bool by_factor = factor == factor, by_entropy = entropy_bound == entropy_bound;
    int64_t of_factor = 0, of_entropy = 0;
    double sum = 0.0, largest = -static_cast<double>(kInfinity);
    for (int64_t i = 0; i < heap->count && (by_factor || by_entropy); ++i) {
      const int64_t c = static_cast<int64_t>(heap->take() & UINT32_MAX);
      if (by_factor) {
        by_factor = i == 0 || certainty(c) >= 1.0f - factor / static_cast<float>(i + 2);
        of_factor += by_factor;
      }
      if (by_entropy) {
        const double nats = static_cast<double>(entropy[c]);
        sum += nats;
        largest = nats > largest ? nats : largest;
        by_entropy = sum - largest <= static_cast<double>(entropy_bound);
        of_entropy += by_entropy;
      }
    }
    if (factor == factor && of_factor == heap->count - 1) of_factor = heap->count;
    return of_factor > of_entropy ? of_factor : of_entropy;
  }

  void run(uint64_t* scratch) const {
    int64_t masked = 0, edited = 0, taken_back = 0, chosen = 0;
    if (transfer.data != nullptr)
      for (int64_t c = 0; c < args.proposed.shape[1]; ++c) transfer[c] = 0;
    if (at<uint8_t>(args.done, b, 0) != 0) {
      for (int64_t c = 0; c < width; ++c) masked += tokens[c] == args.mask_id;
    } else {
      const float threshold = at(args.threshold, b, kOff);
      Heap heap = {scratch, collect(scratch, &masked, &edited, &taken_back)};
      const int64_t reached = set_keys(scratch, heap.count, threshold);
      const int64_t rules[] = {
          at<int32_t>(args.num_select, b, 0), taken_back > 0 ? taken_back + 1 : 0, reached,
          count_ordered(&heap, at(args.factor, b, kOff), at(args.entropy_bound, b, kOff))};
      for (const int64_t n : rules) chosen = n > chosen ? n : chosen;
      if (chosen > heap.count) chosen = heap.count;
      if (chosen > 0) {
        uint64_t limit = UINT64_MAX;  // of the entries that are chosen
        if (chosen == reached && chosen < heap.count)
          limit = static_cast<uint64_t>(falling(threshold)) << 32 | UINT32_MAX;
        else if (chosen < heap.count)
          limit = heap.nth(chosen);
        for (int64_t i = 0; i < heap.count; ++i)
          if (scratch[i] <= limit) choose(static_cast<int64_t>(scratch[i] & UINT32_MAX));
      }
      masked += taken_back - chosen;
      if (args.done.given() && masked == 0 && edited == 0) args.done.ptr<uint8_t>()[b] = 1;
    }
    args.num_masked.ptr<int32_t>()[b] = static_cast<int32_t>(masked);
    args.num_transferred.ptr<int32_t>()[b] = static_cast<int32_t>(edited + chosen);
  }
};

}  // namespace

void unmask_select(const UnmaskSelectArgs& args) {
  check_args(args);
  const int64_t batch = args.tokens.shape[0], length = args.tokens.shape[1], width = args.proposed.shape[1];
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t start = at<int64_t>(args.window_start, b, 0), columns = at(args.window_length, b, width);
    ESOKERN_CHECK(columns >= 0 && columns <= width, "unmask_select: window_length: must be from 0 to width",
                  columns);
    ESOKERN_CHECK(start >= 0 && start <= length - columns,
                  "unmask_select: window_start: the window must lie in the text", start);
  }
  const int64_t rows = width < kTaskColumns ? kTaskColumns / (width > 0 ? width : 1) : 1;  // of a task
  const int64_t tasks = (batch + rows - 1) / rows;
  const Scratch<uint64_t> scratch(width * (tasks > 1 ? max_threads() : 1));
  parallel_for(tasks, [&](int64_t task) {
    uint64_t* own = scratch.data + width * thread_index();
    for (int64_t b = task * rows; b < batch && b < (task + 1) * rows; ++b) Row(args, b).run(own);
  });
}

}  // namespace esokern::cpu::ESOKERN_ISA
