// The primitives of device.cuh as PTX and CUDA runtime calls: the only file with asm. sm_80 and newer.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace esokern::cuda {

// --- threads. Collectives are for converged, full warps.

__device__ __forceinline__ void block_sync() {
  __syncthreads();
}
__device__ __forceinline__ void warp_sync() {
  __syncwarp();
}
template <class T>
__device__ __forceinline__ T shfl(T value, int source_lane) {
  return __shfl_sync(0xffffffffu, value, source_lane);
}
template <class T>
__device__ __forceinline__ T shfl_xor(T value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}
__device__ __forceinline__ uint32_t ballot(bool predicate) {
  return __ballot_sync(0xffffffffu, predicate);
}

// --- shared memory

// Hands out the block's dynamic shared memory, in the order and with the alignments of ArenaSize.
class Arena {
 public:
  template <class T>
  __device__ __forceinline__ T* take(int64_t count, int64_t alignment = 128) {
    extern __shared__ __align__(1024) unsigned char esokern_shared[];
    offset_ = (offset_ + alignment - 1) / alignment * alignment;
    T* array = reinterpret_cast<T*>(esokern_shared + offset_);
    offset_ += count * static_cast<int64_t>(sizeof(T));
    return array;
  }

 private:
  int64_t offset_ = 0;
};

// Address in the shared window, for copies and ldmatrix: plain integer arithmetic in bytes from here on.
__device__ __forceinline__ uint32_t smem_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// --- asynchronous copies, global -> shared. Both addresses aligned to the size. valid = false: zeros are
// written and `global` is not read (it may point anywhere).

__device__ __forceinline__ void copy_async_16(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_4(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(valid ? 4 : 0)
               : "memory");
}
// Closes this thread's group of copies (which may be empty).
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kPending of this thread's newest groups are under way. Other threads see the data after
// a barrier.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- matrices. g = lane / 4, t = lane % 4.

// Four 8x8 matrices of 16-bit elements. Lane 8 m + r gives the address of row r of matrix m (16 bytes, aligned);
// the lane receives of matrix m elements [g][2 t], [g][2 t + 1] in r[m].
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
// The same of the transposed matrices: elements [2 t][g], [2 t + 1][g] as stored.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// d += a b for a [16, 16], b [16, 8], T = bf16 or f16, d in float32:
//   a[0] = A[g][2t..], a[1] = A[g + 8][2t..], a[2] = A[g][2t + 8..], a[3] = A[g + 8][2t + 8..]
//   b0 = B[2t..][g], b1 = B[2t + 8..][g];   d[0], d[1] = D[g][2t..], d[2], d[3] = D[g + 8][2t..]
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                   uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                  uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// --- numbers

// 2^x, relative error about 2^-22; 2^-inf = 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// log2(x), absolute error about 2^-22 near 1, relative elsewhere; log2(0) = -inf.
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x y, rounded before anything is done with it: never part of a fused multiply-add.
__device__ __forceinline__ float mul_rounded(float x, float y) {
  return __fmul_rn(x, y);
}

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(bf16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
// Round to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
// Two numbers in the halves of a word, `low` in the low one.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
__device__ __forceinline__ uint32_t pack<f16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// --- global memory (16-byte accesses: shared too). Addresses aligned to 16 bytes.

__device__ __forceinline__ Bytes16 load_16(const void* from) {
  const uint4 v = *static_cast<const uint4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ __forceinline__ void store_16(void* to, Bytes16 v) {
  *static_cast<uint4*>(to) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}
// A value that other blocks change meanwhile through the atomics below.
__device__ __forceinline__ int32_t load_relaxed(const int32_t* from) {
  int32_t value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ void atomic_max(int32_t* at, int32_t value) {
  atomicMax(at, value);
}
// Returns the value before.
__device__ __forceinline__ int32_t atomic_add(int32_t* at, int32_t value) {
  return atomicAdd(at, value);
}
// Orders this thread's accesses to global memory before it with those after it, for all blocks.
__device__ __forceinline__ void fence() {
  __threadfence();
}

// --- host

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
             "cudaDeviceGetAttribute");
  return count;
}

// kernel(args...) on `stream`; nothing is waited for. Throws std::runtime_error if the launch is refused.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), Grid grid, int threads, int64_t shared_bytes,
            void* stream, Args... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  ESOKERN_CHECK(grid.x < (int64_t{1} << 31) && grid.y < 65536 && grid.z < 65536,
                "a CUDA grid is too large for this call, blocks", grid.x);
  if (shared_bytes > 48 * 1024)
    check_cuda(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        name);
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), name);
}

}  // namespace esokern::cuda
