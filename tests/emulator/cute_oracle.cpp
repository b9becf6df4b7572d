// Fragment layouts of the emulator against an independent statement of them: CuTe's traits of the same instructions
// (CUTLASS 4.2, headers only; they need the CUDA toolkit's headers, nothing runs on a GPU). Operands are dealt out
// to lanes by CuTe's layouts, and what comes back is read by them.
#include <cstdio>
#include <cstring>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/layout.hpp>

#include "emulator.h"
#include "numbers.h"

namespace {

namespace emulator = esokern::emulator;

constexpr int kLanes = 32;
int passed = 0, failed = 0;

void check(bool right, const char* name) {
  printf("%s  %s\n", right ? "ok  " : "FAIL", name);
  ++(right ? passed : failed);
}

template <class Body>
void run_warp(const char* name, int64_t shared_bytes, const Body& body) {
  emulator::run(
      name, {1, 1, 1}, kLanes, shared_bytes,
      [](const void* context) {
        (*static_cast<const Body*>(context))(static_cast<int>(emulator::builtins.thread_index.x));
      },
      &body);
}

// CuTe: (lane, value) -> m + 16 k of A, n + 8 k of B, m + 16 n of C.
template <class Instruction, bool kIsBf16>
bool mma_agrees() {
  using Traits = cute::MMA_Traits<Instruction>;
  const typename Traits::ALayout a_layout;
  const typename Traits::BLayout b_layout;
  const typename Traits::CLayout c_layout;
  float a[256], b[128], c[128], d[128];
  unsigned random = 12345;
  const auto next = [&random] {
    return static_cast<float>((random = random * 1664525 + 1013904223) >> 26) - 32.0f;
  };
  for (float& x : a) x = next();
  for (float& x : b) x = next();
  for (float& x : c) x = next();
  const auto narrow = kIsBf16 ? emulator::narrow_bf16 : emulator::narrow_f16;
  run_warp("mma", 0, [&](int lane) {
    uint16_t a_values[8], b_values[4];
    float sums[4];
    for (int i = 0; i < 8; ++i) a_values[i] = narrow(a[a_layout(lane, i)]);
    for (int i = 0; i < 4; ++i) b_values[i] = narrow(b[b_layout(lane, i)]);
    for (int i = 0; i < 4; ++i) sums[i] = c[c_layout(lane, i)];
    uint32_t a_words[4], b_words[2];
    memcpy(a_words, a_values, sizeof(a_words));
    memcpy(b_words, b_values, sizeof(b_words));
    emulator::mma(sums, a_words, b_words[0], b_words[1], kIsBf16, emulator::here());
    for (int i = 0; i < 4; ++i) d[c_layout(lane, i)] = sums[i];
  });
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      float want = c[m + 16 * n];
      for (int k = 0; k < 16; ++k) want += a[m + 16 * k] * b[n + 8 * k];
      if (d[m + 16 * n] != want) return false;
    }
  return true;
}

// CuTe: what lane s points at from its bit i on goes to lane d's bit j where SrcLayout(s, i) = DstLayout(d, j).
template <class Instruction>
bool ldmatrix_agrees(bool transposed) {
  using Traits = cute::Copy_Traits<Instruction>;
  const typename Traits::SrcLayout source;
  const typename Traits::DstLayout destination;
  uint32_t got[kLanes][4];
  run_warp("ldmatrix", kLanes * 16, [&](int lane) {
    auto* rows = static_cast<uint16_t*>(emulator::take_shared(0, 0, kLanes * 16, 128, emulator::here()));
    uint16_t* row = rows + (lane * 13 % kLanes) * 8;
    for (int i = 0; i < 8; ++i) row[i] = static_cast<uint16_t>(source(lane, i * 16) / 16);
    emulator::warp_sync(emulator::here());
    emulator::ldmatrix(got[lane], emulator::shared_address(row, emulator::here()), transposed,
                       emulator::here());
  });
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 8; ++i)
      if (static_cast<int>(got[lane][i / 2] >> i % 2 * 16 & 0xFFFF) != destination(lane, i * 16) / 16)
        return false;
  return true;
}

}  // namespace

int main() {
  check(mma_agrees<cute::SM80_16x8x16_F32BF16BF16F32_TN, true>(), "mma.m16n8k16 bf16: A, B, C");
  check(mma_agrees<cute::SM80_16x8x16_F32F16F16F32_TN, false>(), "mma.m16n8k16 f16: A, B, C");
  check(ldmatrix_agrees<cute::SM75_U32x4_LDSM_N>(false), "ldmatrix.x4");
  check(ldmatrix_agrees<cute::SM75_U16x8_LDSM_T>(true), "ldmatrix.x4.trans");
  printf("%d checks passed\n", passed);
  return failed > 0;
}
