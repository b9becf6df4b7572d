// The four outputs of a row that a thread of gemm_tile.cuh holds, on their way to memory.
#pragma once

#include <string.h>

#include "cuda/device.cuh"

namespace esokern::cuda {
namespace {

constexpr int kColumns = 4;

template <class T>
struct alignas(kColumns * sizeof(T)) Outputs {
  T value[kColumns];
};

// As one access each, which the compiler does not make of a copied struct.
template <class T>
__device__ __forceinline__ Outputs<T> load_outputs(const T* from) {
  Outputs<T> outputs;
  if constexpr (sizeof outputs == 16) {
    const Bytes16 bytes = load_16(from);
    memcpy(&outputs, &bytes, sizeof outputs);
  } else {
    const uint64_t bytes = *reinterpret_cast<const uint64_t*>(from);
    memcpy(&outputs, &bytes, sizeof outputs);
  }
  return outputs;
}
template <class T>
__device__ __forceinline__ void store_outputs(T* to, const Outputs<T>& outputs) {
  if constexpr (sizeof outputs == 16) {
    Bytes16 bytes;
    memcpy(&bytes, &outputs, sizeof outputs);
    store_16(to, bytes);
  } else {
    uint64_t bytes;
    memcpy(&bytes, &outputs, sizeof outputs);
    *reinterpret_cast<uint64_t*>(to) = bytes;
  }
}

// Can kColumns elements be moved at once, in every row?
template <class T>
bool moves_together(const T* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % sizeof(Outputs<T>) == 0 && stride % kColumns == 0;
}

}  // namespace
}  // namespace esokern::cuda
