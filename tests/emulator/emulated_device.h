// The g++ half of cuda/device.cuh: the primitives of cuda/ptx.cuh with the same names and signatures, plus a
// defaulted last argument that says where the call stands. What they mean is told in ptx.cuh.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"
#include "numbers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

namespace esokern::cuda {

using emulator::here;
using emulator::Site;

inline constexpr const emulator::Index3& threadIdx = emulator::builtins.thread_index;
inline constexpr const emulator::Index3& blockIdx = emulator::builtins.block_index;
inline constexpr const emulator::Index3& blockDim = emulator::builtins.block_dim;
inline constexpr const emulator::Index3& gridDim = emulator::builtins.grid_dim;

// --- threads

inline void block_sync(Site site = here()) {
  emulator::block_sync(site);
}
inline void warp_sync(Site site = here()) {
  emulator::warp_sync(site);
}
template <class T>
T shfl(T value, int source_lane, Site site = here()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shfl takes 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = emulator::shuffle(bits, static_cast<unsigned>(source_lane) % kWarpSize, site);
  memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
T shfl_xor(T value, int lane_mask, Site site = here()) {
  return shfl(value, static_cast<int>(threadIdx.x % kWarpSize) ^ lane_mask, site);
}
inline uint32_t ballot(bool predicate, Site site = here()) {
  return emulator::ballot(predicate, site);
}

// --- shared memory

class Arena {
 public:
  template <class T>
  T* take(int64_t count, int64_t alignment = 128, Site site = here()) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    offset_ = (offset_ + alignment - 1) / alignment * alignment;
    void* array = emulator::take_shared(index_++, offset_, bytes, alignment, site);
    offset_ += bytes;
    return static_cast<T*>(array);
  }

 private:
  int64_t offset_ = 0;
  int index_ = 0;
};

inline uint32_t smem_address(const void* shared, Site site = here()) {
  return emulator::shared_address(shared, site);
}

// --- asynchronous copies

inline void copy_async_16(uint32_t shared, const void* global, bool valid, Site site = here()) {
  emulator::copy_async(shared, global, 16, valid, site);
}
inline void copy_async_4(uint32_t shared, const void* global, bool valid, Site site = here()) {
  emulator::copy_async(shared, global, 4, valid, site);
}
inline void copy_async_commit(Site site = here()) {
  emulator::copy_async_commit(site);
}
template <int kPending>
void copy_async_wait(Site site = here()) {
  emulator::copy_async_wait(kPending, site);
}

// --- matrices

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t row, Site site = here()) {
  emulator::ldmatrix(r, row, false, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row, Site site = here()) {
  emulator::ldmatrix(r, row, true, site);
}
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = here()) {
  constexpr bool kIsBf16 = dtype_of<T>::value == DType::bf16;
  static_assert(kIsBf16 || dtype_of<T>::value == DType::f16, "mma_m16n8k16 takes bf16 and f16");
  emulator::mma(d, a, b0, b1, kIsBf16, site);
}

// --- numbers

inline float exp2_fast(float x) {
  return emulator::exp2_ftz(x);
}
inline float log2_fast(float x) {
  return emulator::log2_ftz(x);
}
inline float mul_rounded(float x, float y) {
  return x * y;  // these sources are compiled for machines without fused multiply-add
}
inline float to_float(float x) {
  return x;
}
inline float to_float(bf16 x) {
  return emulator::widen_bf16(x.bits);
}
inline float to_float(f16 x) {
  return emulator::widen_f16(x.bits);
}
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  return {emulator::narrow_bf16(x)};
}
template <>
inline f16 from_float<f16>(float x) {
  return {emulator::narrow_f16(x)};
}
template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

// --- memory

inline Bytes16 load_16(const void* from, Site site = here()) {
  Bytes16 value;
  emulator::load(&value, from, 16, site);
  return value;
}
inline void store_16(void* to, Bytes16 value, Site site = here()) {
  emulator::store(to, &value, 16, site);
}
inline int32_t load_relaxed(const int32_t* from, Site site = here()) {
  return emulator::load_relaxed(from, site);
}
inline void atomic_max(int32_t* at, int32_t value, Site site = here()) {
  emulator::atomic_max(at, value, site);
}
inline int32_t atomic_add(int32_t* at, int32_t value, Site site = here()) {
  return emulator::atomic_add(at, value, site);
}
inline void fence(Site site = here()) {
  emulator::fence(site);
}

// --- host

inline int multiprocessors() {
  return emulator::multiprocessors();
}

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), Grid grid, int threads, int64_t shared_bytes,
            void* /*stream*/, Args... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  ESOKERN_CHECK(grid.x < (int64_t{1} << 31) && grid.y < 65536 && grid.z < 65536,
                "a CUDA grid is too large for this call, blocks", grid.x);
  const auto body = [&] { kernel(static_cast<Params>(args)...); };
  emulator::run(
      name, {grid.x, grid.y, grid.z}, threads, shared_bytes,
      [](const void* context) { (*static_cast<decltype(&body)>(context))(); }, &body);
}

}  // namespace esokern::cuda
