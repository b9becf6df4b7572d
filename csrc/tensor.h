// A non-owning view of somebody's memory: what every kernel takes. Strides are in elements.
#pragma once

#include <cstdint>

#include "check.h"

namespace esokern {

enum class DType : int32_t { none, f32, f16, bf16, f64, i32, i64, u8 };

// Storage types of the two half formats; arithmetic is always in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct dtype_of;
template <>
struct dtype_of<float> {
  static constexpr DType value = DType::f32;
};
template <>
struct dtype_of<f16> {
  static constexpr DType value = DType::f16;
};
template <>
struct dtype_of<bf16> {
  static constexpr DType value = DType::bf16;
};
template <>
struct dtype_of<int32_t> {
  static constexpr DType value = DType::i32;
};
template <>
struct dtype_of<int64_t> {
  static constexpr DType value = DType::i64;
};
template <>
struct dtype_of<uint8_t> {
  static constexpr DType value = DType::u8;
};

struct Tensor {
  static constexpr int kMaxDims = 5;
  void* data = nullptr;
  DType dtype = DType::none;  // none = the argument was not given
  int32_t ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};

  bool given() const { return dtype != DType::none; }

  // Typed pointer; nullptr if the tensor was not given. A wrong dtype throws rather than misreads.
  template <class T>
  T* ptr() const {
    if (!given()) return nullptr;
    ESOKERN_CHECK(dtype == dtype_of<T>::value, "a tensor argument has a dtype its kernel does not take",
                  static_cast<long long>(dtype));
    return static_cast<T*>(data);
  }
};

}  // namespace esokern
