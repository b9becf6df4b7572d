// Tests of the emulator: what the primitives do, how launches fail and recover, then the planted faults (faults.cpp).
// Built plain, with the race checker and with AddressSanitizer; the kernels are compiled as all kernels are.
#include "self_test.h"

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cuda/device.cuh"

extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "detect_leaks=0";  // a fibre that is abandoned after an error frees nothing
}

namespace esokern::self_test {
namespace {

int passed_count = 0, failed_count = 0;

}  // namespace

void check(bool passed, const std::string& name) {
  printf("%s  %s\n", passed ? "ok  " : "FAIL", name.c_str());
  ++(passed ? passed_count : failed_count);
}

bool built_as(const char* flavour) {
  return strcmp(emulator::built_with(), flavour) == 0;
}

}  // namespace esokern::self_test

namespace esokern::cuda {
namespace {

using self_test::check;
using self_test::error_of;

const char* const kSchedules[] = {"in_order", "reverse", "random", "starving"};

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

// --- numbers

// The nearest of the format's numbers, ties to even, by trying all: `widen` maps codes to values in rising order.
template <class T>
bool rounds_to_nearest(float x, uint16_t code) {
  const uint16_t magnitude = code & 0x7FFF;
  const auto value = [](uint16_t c) { return static_cast<double>(to_float(T{c})); };
  const double exact = std::fabs(static_cast<double>(x)), here = value(magnitude);
  const double up = std::fabs(value(magnitude + 1) - exact), error = std::fabs(here - exact);
  const double down = magnitude == 0 ? INFINITY : std::fabs(value(magnitude - 1) - exact);
  const bool even = magnitude % 2 == 0;
  return (error < up || (error == up && even)) && (error < down || (error == down && even)) &&
         std::signbit(x) == (code >> 15 != 0);
}

template <class T>
void check_format(const char* name, uint16_t infinity) {
  bool round_trip = true, nearest = true;
  for (uint32_t code = 0; code < 0x10000; ++code) {
    const T number{static_cast<uint16_t>(code)};
    const bool is_nan = (code & 0x7FFF) > infinity;
    round_trip &= from_float<T>(to_float(number)).bits == (is_nan ? 0x7FFF : code);
    if ((code & 0x7FFF) + 1 >= infinity) continue;
    const float low = to_float(number), high = to_float(T{static_cast<uint16_t>(code + 1)});
    for (const float x : {low + (high - low) * 0.5f, low + (high - low) * 0.49f, low + (high - low) * 0.51f})
      nearest &= rounds_to_nearest<T>(x, from_float<T>(x).bits);
  }
  check(round_trip, std::string(name) + ": every code survives float32");
  check(nearest, std::string(name) + ": rounds to nearest, ties to even");
  check(from_float<T>(INFINITY).bits == infinity && from_float<T>(-3.4e38f).bits == (infinity | 0x8000),
        std::string(name) + ": infinity and overflow");
  check(pack<T>(1.0f, -2.0f) ==
            (from_float<T>(1.0f).bits | static_cast<uint32_t>(from_float<T>(-2.0f).bits) << 16),
        std::string(name) + ": pack puts the first number low");
}

void check_numbers() {
  check_format<f16>("f16", 0x7C00);
  check_format<bf16>("bf16", 0x7F80);
  check(exp2_fast(-INFINITY) == 0 && exp2_fast(3) == 8 && exp2_fast(-140) == 0,
        "exp2_fast: powers, flush to zero");
  check(log2_fast(8) == 3 && log2_fast(0) == -INFINITY && log2_fast(1e-40f) == -INFINITY,
        "log2_fast: flush to zero");
}

// --- collectives

__global__ void collectives(int* wrong) {
  const int thread = threadIdx.x, lane = thread % kWarpSize;
  const int rotated = shfl(thread, lane + 1);
  const double other = shfl_xor(thread * 0.5, 5);
  const uint32_t odd = ballot(lane % 2 == 1);
  if (rotated != thread / 32 * 32 + (lane + 1) % 32) atomic_add(wrong, 1);
  if (other != (thread ^ 5) * 0.5) atomic_add(wrong, 1);
  if (odd != 0xAAAAAAAAu) atomic_add(wrong, 1);
}

__global__ void those_left(int* wrong) {
  const int lane = threadIdx.x % kWarpSize;
  if (lane >= 20) return;
  if (ballot(true) != 0xFFFFFu) atomic_add(wrong, 1);
  if (shfl(lane, 3) != 3) atomic_add(wrong, 1);
  block_sync();
}

__global__ void mma_of_some(float* out) {
  if (threadIdx.x == 31) return;
  float d[4] = {};
  const uint32_t a[4] = {};
  mma_m16n8k16<bf16>(d, a, 0, 0);
  out[threadIdx.x] = d[0];
}

// D = A B + C for A [16][16] and B [16][8], both by rows, B through ldmatrix_x4_trans.
template <class T>
__global__ void matrices(const T* ab, float* d) {
  Arena arena;
  T* shared = arena.take<T>(24 * 16);
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < 256; i += kWarpSize) shared[i] = ab[i];
  T* b_rows = arena.take<T>(16 * 8);
  for (int i = lane; i < 128; i += kWarpSize) b_rows[i] = ab[256 + i];
  warp_sync();
  uint32_t a[4], b[4];
  ldmatrix_x4(a, smem_address(shared + lane % 16 * 16 + lane / 16 * 8));
  ldmatrix_x4_trans(b, smem_address(b_rows + lane % 16 * 8));
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma_m16n8k16<T>(sum, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

template <class T>
bool matrices_are_right() {
  std::vector<T> ab(24 * 16);
  for (size_t i = 0; i < ab.size(); ++i) ab[i] = from_float<T>(static_cast<float>(i * 31 % 17) - 8.0f);
  std::vector<float> d(16 * 8, 0.5f);
  launch("matrices", matrices<T>, Grid{}, 32, 2048, nullptr, ab.data(), d.data());
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      float want = 0.5f;
      for (int k = 0; k < 16; ++k) want += to_float(ab[row * 16 + k]) * to_float(ab[256 + k * 8 + column]);
      if (d[row * 8 + column] != want) return false;
    }
  return true;
}

void check_collectives() {
  int wrong = 0;
  for (const char* schedule : kSchedules) {
    emulator::set_schedule(schedule, 7);
    launch("collectives", collectives, Grid{3, 2}, 1024, 0, nullptr, &wrong);
    launch("those_left", those_left, Grid{2}, 96, 0, nullptr, &wrong);
  }
  emulator::set_schedule("in_order");
  check(wrong == 0, "shfl, shfl_xor, ballot in every schedule, exited lanes excused");
  check(matrices_are_right<bf16>() && matrices_are_right<f16>(),
        "ldmatrix_x4, ldmatrix_x4_trans, mma_m16n8k16");
  std::vector<float> out(32);
  check(contains(error_of([&] { launch("mma", mma_of_some, Grid{}, 32, 0, nullptr, out.data()); }),
                 "all 32 lanes"),
        "mma wants all lanes");
}

// --- copies and memory

__global__ void copies(const int* in, int* out, int early) {
  Arena arena;
  int* shared = arena.take<int>(32 * 4);
  const int lane = threadIdx.x;
  const uint32_t to = smem_address(shared + lane * 4);
  if (lane % 2 == 0)
    copy_async_16(to, in + lane * 4, lane < 16);
  else
    for (int i = 0; i < 4; ++i) copy_async_4(to + i * 4, in + lane * 4 + i, lane < 16);
  copy_async_commit();
  if (early == 0) copy_async_wait<0>();
  if (early == 2) copy_async_wait<1>();
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = shared[lane * 4 + i];
  copy_async_wait<0>();
}

__global__ void misaligned(const int* in, int* out) {
  store_16(out, load_16(in + 1));
}

__global__ void extremes(int* at) {
  atomic_max(at, static_cast<int>(threadIdx.x + blockIdx.x * 64));
  atomic_add(at + 1, 2);
}

void check_memory() {
  alignas(16) int in[128], out[128], counters[2] = {-1, 0};
  for (int i = 0; i < 128; ++i) in[i] = i + 1;
  launch("copies", copies, Grid{}, 32, 512, nullptr, in, out, 0);
  bool right = true;
  for (int i = 0; i < 128; ++i) right &= out[i] == (i < 64 ? i + 1 : 0);
  check(right, "copy_async_16 and copy_async_4, zeros where not valid");
  for (const int early : {1, 2}) {
    const std::string error =
        error_of([&] { launch("copies", copies, Grid{}, 32, 512, nullptr, in, out, early); });
    const bool poisoned = error.empty() && out[0] == -1 && out[127] == -1;
    check(self_test::built_as("race") ? contains(error, "under way") : poisoned,
          "data are poison before their wait");
  }
  launch("extremes", extremes, Grid{4}, 64, 0, nullptr, counters);
  check(counters[0] == 255 && counters[1] == 512, "atomic_max and atomic_add");
  check(contains(error_of([&] { launch("misaligned", misaligned, Grid{}, 1, 0, nullptr, in, out); }),
                 "multiple"),
        "16 bytes at a multiple of 4 are refused");
}

// --- launches

__global__ void fill(int* out, int value) {
  const auto block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * blockDim.x + threadIdx.x] = value;
}

__global__ void two_arenas(int* out) {
  Arena first;
  int* a = first.take<int>(32);
  Arena second;
  int* b = second.take<int>(16);
  a[0] = b[0] = out[0];
}

void check_launches() {
  std::vector<int> out(2 * 3 * 4 * 33);
  for (const char* schedule : kSchedules) {
    emulator::set_schedule(schedule, 11);
    std::fill(out.begin(), out.end(), 0);
    launch("fill", fill, Grid{2, 3, 4}, 33, 0, nullptr, out.data(), 1);
    bool right = true;
    for (const int x : out) right &= x == 1;
    check(right, std::string("every thread of every block runs, ") + schedule);
  }
  emulator::set_schedule("in_order");
  launch("fill", fill, Grid{0, 3, 4}, 33, 0, nullptr, out.data(), 2);
  check(out[0] == 1, "an empty grid does nothing");
  const std::string error =
      error_of([&] { launch("two", two_arenas, Grid{}, 32, 512, nullptr, out.data()); });
  check(contains(error, "kernel two: self_test.cpp:") &&
            contains(error, "block (0, 0, 0) thread 0 (warp 0 lane 0)"),
        "an error names kernel, line, block and thread");
  launch("fill", fill, Grid{}, 32, 0, nullptr, out.data(), 3);
  check(out[31] == 3, "the launch after an error works");
  std::string elsewhere = "not run";
  std::thread([&] {
    elsewhere = error_of([&] { launch("two", two_arenas, Grid{}, 32, 512, nullptr, out.data()); });
    launch("fill", fill, Grid{}, 32, 0, nullptr, out.data(), 4);
  }).join();
  check(elsewhere == error && out[31] == 4, "another thread of the host may launch, and gets the errors");
  check(contains(
            error_of([&] { launch("fill", fill, Grid{}, 32, kMaxSharedBytes + 1, nullptr, out.data(), 3); }),
            "shared memory"),
        "more shared memory than a GPU has is refused");
  emulator::set_multiprocessors(3);
  check(multiprocessors() == 3, "multiprocessors");
  emulator::set_multiprocessors(4);
}

}  // namespace
}  // namespace esokern::cuda

int main() {
  printf("emulator built %s\n", esokern::emulator::built_with());
  esokern::cuda::check_numbers();
  esokern::cuda::check_collectives();
  esokern::cuda::check_memory();
  esokern::cuda::check_launches();
  esokern::self_test::check_faults();
  using esokern::self_test::failed_count, esokern::self_test::passed_count;
  if (failed_count > 0) printf("%d checks failed\n", failed_count);
  printf("%d checks passed\n", passed_count);
  return failed_count > 0;
}
