// Do two matrices share memory? By their pointers alone, so it serves host and device memory.
#pragma once

#include "tensor.h"

namespace esokern {

// Rows of two matrices with contiguous last dimensions. Columns side by side in one buffer do not overlap.
static inline bool overlap(const Tensor& a, const Tensor& b, int64_t element_size) {
  if (a.shape[0] == 0 || a.shape[1] == 0 || b.shape[0] == 0 || b.shape[1] == 0) return false;
  const auto bytes = [&](const Tensor& t) {
    return ((t.shape[0] - 1) * t.stride[0] + t.shape[1]) * element_size;
  };
  const char* a_begin = static_cast<const char*>(a.data);
  const char* b_begin = static_cast<const char*>(b.data);
  if (a_begin + bytes(a) <= b_begin || b_begin + bytes(b) <= a_begin) return false;
  const int64_t row = a.stride[0] * element_size;
  if (a.stride[0] != b.stride[0] || row == 0) return true;
  const int64_t offset = ((b_begin - a_begin) % row + row) % row;
  return offset < a.shape[1] * element_size || offset + b.shape[1] * element_size > row;
}

}  // namespace esokern
