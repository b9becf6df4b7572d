// An optional argument with a value per row.
#pragma once

#include "cuda/device.cuh"

namespace esokern::cuda {
namespace {

template <class T>
struct PerRow {
  const T* data;  // null: `otherwise` for all rows
  int64_t stride;
  T otherwise;
  __device__ __forceinline__ T operator[](int64_t row) const {
    return data == nullptr ? otherwise : data[row * stride];
  }
};

template <class T>
PerRow<T> per_row(const Tensor& tensor, T otherwise) {
  return {tensor.ptr<T>(), tensor.given() ? tensor.stride[0] : 0, otherwise};
}

}  // namespace
}  // namespace esokern::cuda
