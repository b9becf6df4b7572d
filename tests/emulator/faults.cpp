// Planted faults: each a small kernel whose whole version passes in every build, and whose broken version must be
// caught by the builds named: by an error of the launch, a wrong result, or AddressSanitizer's report.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <functional>
#include <stdexcept>
#include <vector>

#include "cuda/device.cuh"
#include "self_test.h"

namespace esokern::cuda {
namespace {

// --- D[16][16] = A[16][64] B[16][64]^T by two warps, B's rows behind A's, fetched in two stages

enum class Break {
  none,
  short_wait,
  no_commit,
  no_wait,
  one_sided_swizzle,
  no_swizzle,
  fragment,
  shared_index
};

struct Tile {
  bf16* rows;
  template <class Source>
  constexpr explicit Tile(Source& source) : rows(source.template take<bf16>(32 * 64, 1024)) {}
};

template <Break kBreak>
__global__ void __launch_bounds__(64) gemm(const bf16* ab, float* d) {
  Arena arena;
  const uint32_t tile = smem_address(Tile(arena).rows);
  const int thread = threadIdx.x, warp = thread / kWarpSize, lane = thread % kWarpSize;
  const auto address = [tile](int row, int chunk, bool swizzled) {
    return tile + row * 128 + (swizzled ? chunk ^ (row % 8) : chunk) * 16;
  };
  constexpr bool kSwizzleStores = kBreak != Break::no_swizzle;
  constexpr bool kSwizzleLoads = kSwizzleStores && kBreak != Break::one_sided_swizzle;
  for (int stage = 0; stage < 2; ++stage) {
    for (int i = thread; i < 32 * 4; i += 64) {
      const int row = i / 4, chunk = stage * 4 + i % 4;
      copy_async_16(address(row, chunk, kSwizzleStores), ab + row * 64 + chunk * 8, true);
    }
    if (kBreak != Break::no_commit || stage == 0) copy_async_commit();
  }
  float sum[4] = {};
  for (int stage = 0; stage < 2; ++stage) {
    if (stage == 0 || kBreak == Break::short_wait)
      copy_async_wait<1>();
    else if (kBreak != Break::no_wait)
      copy_async_wait<0>();
    block_sync();
    uint32_t a[4], b[4];
    const int past = kBreak == Break::shared_index && stage == 1 ? 24 : 0;
    ldmatrix_x4(b, address(16 + 8 * warp + lane % 8 + past, stage * 4 + lane / 8, kSwizzleLoads));
    for (int k = 0; k < 2; ++k) {
      ldmatrix_x4(a, address(lane % 16, stage * 4 + k * 2 + lane / 16, kSwizzleLoads));
      mma_m16n8k16<bf16>(sum, a, b[2 * k], b[2 * k + 1]);
    }
  }
  const int g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = kBreak == Break::fragment ? g + 8 * (i % 2) : g + 8 * (i / 2);
    const int column = kBreak == Break::fragment ? 2 * t + i / 2 : 2 * t + i % 2;
    d[row * 16 + warp * 8 + column] = sum[i];
  }
}

template <Break kBreak>
bool gemm_is_right() {
  std::vector<bf16> ab(32 * 64);
  for (size_t i = 0; i < ab.size(); ++i) ab[i] = from_float<bf16>(static_cast<float>(i * 7919 % 13) - 6.0f);
  std::vector<float> d(16 * 16, NAN);
  ArenaSize size;
  Tile{size};
  emulator::reset_bank_conflicts();
  launch("gemm", gemm<kBreak>, Grid{}, 64, size.bytes(), nullptr, ab.data(), d.data());
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 16; ++column) {
      float want = 0;
      for (int k = 0; k < 64; ++k) want += to_float(ab[row * 64 + k]) * to_float(ab[(16 + column) * 64 + k]);
      if (d[row * 16 + column] != want) return false;
    }
  return emulator::bank_conflicts() == 0;
}

// --- exchanges between 128 threads, out[i] = i + 33 modulo 128

struct Exchange {
  int* values;
  int* spare;
  template <class Source>
  constexpr explicit Exchange(Source& source)
      : values(source.template take<int>(128)), spare(source.template take<int>(4, 4)) {}
};

template <bool kBroken>
__global__ void missing_barrier(int* out, int) {
  Arena arena;
  Exchange shared(arena);
  const int i = threadIdx.x;
  shared.values[i] = i;
  if (!kBroken) block_sync();
  out[i] = shared.values[(i + 33) % 128];
}

template <bool kBroken>
__global__ void stage_reused(int* out, int) {
  Arena arena;
  Exchange shared(arena);
  const int i = threadIdx.x;
  for (int round = 0; round < 3; ++round) {
    shared.values[i] = i + (round - 2) * 1000;
    block_sync();
    out[i] = shared.values[(i + 33) % 128];
    if (!kBroken) block_sync();
  }
}

template <bool kBroken>
__global__ void missing_warp_sync(int* out, int) {
  Arena arena;
  Exchange shared(arena);
  const int i = threadIdx.x;
  shared.values[(i + 1) % 32 + i / 32 * 32] = i;
  if (!kBroken) warp_sync();
  out[i] = (shared.values[i] + 34) % 128 - (i % 32 == 0 ? 32 : 0);
  if (out[i] < 0) out[i] += 128;
}

template <bool kBroken>
__global__ void divergent_barrier(int* out, int) {
  const int i = threadIdx.x;
  if (!kBroken || i < 32)
    block_sync();
  else
    block_sync();
  out[i] = (i + 33) % 128;
}

// The last warp exits instead of meeting the others, who read what it has written.
template <bool kBroken>
__global__ void exit_for_a_barrier(int* out, int) {
  Arena arena;
  Exchange shared(arena);
  const int i = threadIdx.x;
  shared.values[127 - i] = 127 - i;
  out[i] = (i + 33) % 128;
  if (kBroken && i < 32) return;
  block_sync();
  if (i >= 64) out[i] = shared.values[(i + 33) % 128];
}

template <bool kBroken>
__global__ void divergent_shuffle(int* out, int) {
  const int i = threadIdx.x;
  int value = 0;
  if (!kBroken || i % 2 == 0) value = shfl_xor(i, 2);
  out[i] = (ballot(value >= 0) != 0 ? i + 33 : value) % 128;
}

template <bool kBroken>
__global__ void wait_for_each_other(int* out, int) {
  const int i = threadIdx.x;
  if (kBroken && i % 32 == 0) block_sync();
  warp_sync();
  if (!kBroken || i % 32 != 0) block_sync();
  out[i] = (i + 33) % 128;
}

template <bool kBroken>
__global__ void endless_loop(int* out, int zero) {
  const int i = threadIdx.x;
  while (kBroken && load_relaxed(out + i) != zero) {
  }
  out[i] = (i + 33) % 128;
}

template <bool kBroken>
__global__ void shared_store_beyond(int* out, int) {
  Arena arena;
  Exchange shared(arena);
  const int i = threadIdx.x;
  shared.values[i + (kBroken ? 1 : 0)] = i;
  block_sync();
  out[i] = (i + 33) % 128;
}

template <bool kBroken>
__global__ void shared_load_beyond(int* out, int) {
  Arena arena;
  Exchange shared(arena);
  const int i = threadIdx.x;
  shared.values[i] = i;
  block_sync();
  out[i] = kBroken ? shared.values[i + 33] : shared.values[(i + 33) % 128];
}

template <bool kBroken>
__global__ void shared_never_written(int* out, int) {
  Arena arena;
  Exchange shared(arena);
  const int i = threadIdx.x;
  if (!kBroken || i < 127) shared.values[i] = i;
  block_sync();
  out[i] = (shared.values[i] < -1 ? 0 : i + 33) % 128;  // NaN, here -1, does no harm
}

template <bool kBroken>
__global__ void global_load_beyond(int* out, int) {
  const int i = threadIdx.x;
  out[i] = (i + 33) % 128;
  if (i == 127 && out[i + (kBroken ? 1 : 0)] == 12345) out[i] = 0;
}

template <bool kBroken>
__global__ void global_primitive_beyond(int* out, int) {
  const int i = threadIdx.x;
  out[i] = (i + 33) % 128;
  block_sync();
  if (i == 127 && load_16(out + (kBroken ? 128 : 124)).word[0] == 12345) out[i] = 0;
}

template <bool kBroken>
__global__ void blocks_write_the_same(int* out, int) {
  if (kBroken || blockIdx.x == 0) out[threadIdx.x] = (threadIdx.x + 33) % 128;
}

using ExchangeKernel = void (*)(int*, int);
bool exchange_is_right(ExchangeKernel kernel, int64_t blocks = 1, int64_t bytes_missing = 0) {
  std::vector<int> out(128, -1);
  ArenaSize size;
  Exchange{size};
  launch("exchange", kernel, Grid{blocks}, 128, size.bytes() - bytes_missing, nullptr, out.data(), 0);
  for (int i = 0; i < 128; ++i)
    if (out[i] != (i + 33) % 128) return false;
  return true;
}

// --- a sum over 16 blocks, which the last of them to come adds up

enum class Fence { both, none_before, none_after };

template <Fence kFence>
__global__ void last_block_sums(const int* in, int* partial, int* counter, int* out) {
  Arena arena;
  Exchange shared(arena);
  const int i = threadIdx.x;
  partial[blockIdx.x * 128 + i] = in[blockIdx.x * 128 + i];
  block_sync();
  if (i == 0) {
    if (kFence != Fence::none_before) fence();
    shared.spare[0] = atomic_add(counter, 1);
    if (kFence != Fence::none_after) fence();
  }
  block_sync();
  if (shared.spare[0] != static_cast<int>(gridDim.x) - 1) return;
  int sum = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) sum += partial[block * 128 + i];
  out[i] = sum;
  if (i == 0) *counter = 0;
}

template <Fence kFence>
bool sum_is_right() {
  std::vector<int> in(16 * 128), partial(16 * 128, -1), out(128, -1);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<int>(i % 97);
  int counter = 0;
  ArenaSize size;
  Exchange{size};
  launch("last_block_sums", last_block_sums<kFence>, Grid{16}, 128, size.bytes(), nullptr, in.data(),
         partial.data(), &counter, out.data());
  for (int i = 0; i < 128; ++i) {
    int want = 0;
    for (int block = 0; block < 16; ++block) want += in[block * 128 + i];
    if (out[i] != want) return false;
  }
  return counter == 0;
}

}  // namespace
}  // namespace esokern::cuda

namespace esokern::self_test {
namespace {

using namespace cuda;

constexpr int kPlain = 1, kRace = 2, kAsan = 4, kAll = 7;

struct Fault {
  const char* name;
  int caught_by;  // builds in which it must be
  std::function<bool()> whole, broken;
  bool asan_reports = false;  // which ends the process
};

template <class Run>
Fault exchange(const char* name, int caught_by, Run whole, Run broken, bool asan_reports = false,
               int blocks = 1) {
  return {name, caught_by, [=] { return exchange_is_right(whole, blocks); },
          [=] { return exchange_is_right(broken, blocks); }, asan_reports};
}
#define EXCHANGE(kernel, ...) exchange<ExchangeKernel>(#kernel, __VA_ARGS__)
#define BOTH(kernel) kernel<false>, kernel<true>

template <Break kBreak>
Fault gemm_fault(const char* name) {
  return {name, kAll, gemm_is_right<Break::none>, gemm_is_right<kBreak>};
}

// "" if the run is right, otherwise what was wrong with it.
std::string outcome(const std::function<bool()>& run) {
  bool right = true;
  const std::string error = error_of([&] { right = run(); });
  return error.empty() && !right ? "a wrong result" : error;
}

std::string outcome_in_a_child(const std::function<bool()>& run) {
  fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    if (freopen("/dev/null", "w", stderr) == nullptr) _exit(1);
    _exit(outcome(run).empty() ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? "" : "the report of AddressSanitizer";
}

struct Schedule {
  const char* name;
  uint64_t seed;
};
constexpr Schedule kSchedules[] = {{"in_order", 0}, {"reverse", 0},  {"random", 1},  {"random", 2},
                                   {"starving", 1}, {"starving", 2}, {"starving", 3}};

}  // namespace

void check_faults() {
  const Fault faults[] = {
      EXCHANGE(missing_barrier, kAll, BOTH(missing_barrier)),
      EXCHANGE(stage_reused, kRace, BOTH(stage_reused)),
      EXCHANGE(missing_warp_sync, kRace, BOTH(missing_warp_sync)),
      EXCHANGE(divergent_barrier, kAll, BOTH(divergent_barrier)),
      EXCHANGE(exit_for_a_barrier, kRace, BOTH(exit_for_a_barrier)),
      EXCHANGE(divergent_shuffle, kAll, BOTH(divergent_shuffle)),
      EXCHANGE(wait_for_each_other, kAll, BOTH(wait_for_each_other)),
      EXCHANGE(endless_loop, kAll, BOTH(endless_loop)),
      gemm_fault<Break::short_wait>("short_wait"),
      gemm_fault<Break::no_commit>("missing_commit"),
      gemm_fault<Break::no_wait>("copy_pending_at_exit"),
      gemm_fault<Break::one_sided_swizzle>("one_sided_swizzle"),
      gemm_fault<Break::no_swizzle>("no_swizzle"),
      gemm_fault<Break::fragment>("wrong_fragment_index"),
      gemm_fault<Break::shared_index>("shared_primitive_beyond"),
      EXCHANGE(shared_store_beyond, kAll, BOTH(shared_store_beyond), true),
      EXCHANGE(shared_load_beyond, kAll, BOTH(shared_load_beyond), true),
      EXCHANGE(shared_never_written, kRace, BOTH(shared_never_written)),
      {"too_little_shared_memory", kAll, [] { return exchange_is_right(missing_barrier<false>); },
       [] { return exchange_is_right(missing_barrier<false>, 1, 4); }},
      EXCHANGE(global_load_beyond, kAsan, BOTH(global_load_beyond), true),
      EXCHANGE(global_primitive_beyond, kAsan, BOTH(global_primitive_beyond)),
      EXCHANGE(blocks_write_the_same, kRace, BOTH(blocks_write_the_same), false, 2),
      {"no_fence_before_the_atomic", kRace, sum_is_right<Fence::both>, sum_is_right<Fence::none_before>},
      {"no_fence_after_the_atomic", kRace, sum_is_right<Fence::both>, sum_is_right<Fence::none_after>},
  };
  const int build = built_as("race") ? kRace : built_as("asan") ? kAsan : kPlain;
  emulator::set_step_limit(100'000);
  for (const Fault& fault : faults) {
    std::string wrong, caught;
    for (const Schedule& schedule : kSchedules) {
      emulator::set_schedule(schedule.name, schedule.seed);
      if (wrong.empty()) wrong = outcome(fault.whole);
      if (!caught.empty()) continue;
      caught =
          build == kAsan && fault.asan_reports ? outcome_in_a_child(fault.broken) : outcome(fault.broken);
    }
    const bool must = (fault.caught_by & build) != 0;
    check(wrong.empty(), std::string(fault.name) + ", whole: " + (wrong.empty() ? "passes" : wrong));
    check(!caught.empty() || !must, std::string(fault.name) + ", broken: " +
                                        (!caught.empty() ? caught
                                         : must          ? "MISSED"
                                                         : "not for this build to see"));
  }
  emulator::set_schedule("in_order");
  emulator::set_step_limit(100'000'000);
}

}  // namespace esokern::self_test
