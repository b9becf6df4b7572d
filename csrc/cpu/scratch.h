// Memory that frees itself. Kernels must not allocate through std::, whose code would leak between instruction sets.
#pragma once

#include <stdlib.h>

#include <cstdint>

#include "check.h"

namespace esokern::cpu::ESOKERN_ISA {
namespace {

// `count` uninitialised elements; no memory for count = 0. Throws if there is none left.
template <class T>
struct Scratch {
  T* data;
  explicit Scratch(int64_t count) : data(nullptr) {
    if (count > 0) data = static_cast<T*>(malloc(static_cast<size_t>(count) * sizeof(T)));
    ESOKERN_CHECK(count <= 0 || data != nullptr, "out of memory for scratch, elements", count);
  }
  ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

}  // namespace
}  // namespace esokern::cpu::ESOKERN_ISA
