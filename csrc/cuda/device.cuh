// What a kernel may ask of the hardware. One function is one instruction, or one idiom of the CUDA runtime; the
// list is below, and there is no other way: kernels contain no asm, no <<<>>>, no __CUDA_ARCH__. That is what
// lets the same sources run on the host, under the emulator in tests/emulator.
//
//   thread   block_sync  warp_sync  shfl  shfl_xor  ballot           full warps, converged
//   shared   Arena  smem_address                                     32-bit addresses for the two below
//   copies   copy_async_16  copy_async_4  copy_async_commit  copy_async_wait     global -> shared
//   matrix   ldmatrix_x4  ldmatrix_x4_trans  mma_m16n8k16            fragments as in the PTX ISA, section 9.7.14
//   number   exp2_fast  log2_fast  mul_rounded  to_float  from_float  pack
//   memory   load_16  store_16  load_relaxed  atomic_max  atomic_add  fence
//   host     launch  multiprocessors
#pragma once

#include <cstdint>

#include "check.h"
#include "common/hd.h"
#include "tensor.h"

namespace esokern::cuda {

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

// 16 bytes as one access.
struct alignas(16) Bytes16 {
  uint32_t word[4];
};

constexpr int kWarpSize = 32;
// Dynamic shared memory that a block may have on every GPU served (sm_86, sm_89 and sm_120 have the least).
constexpr int64_t kMaxSharedBytes = 99 * 1024;

// Adds up what Arena would hand out: the host's side of a kernel's `struct Smem`, which takes either.
class ArenaSize {
 public:
  template <class T>
  constexpr T* take(int64_t count, int64_t alignment = 128) {
    bytes_ = (bytes_ + alignment - 1) / alignment * alignment + count * static_cast<int64_t>(sizeof(T));
    return nullptr;
  }
  constexpr int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

}  // namespace esokern::cuda

#if defined(__CUDACC__)
#include "cuda/ptx.cuh"
#else
#include "emulated_device.h"
#endif
