// The arrays of a call's workspace.
#pragma once

#include <cstdint>

namespace esokern::cuda {

// Hands out memory as ArenaSize of device.cuh adds it up.
class Workspace {
 public:
  explicit Workspace(void* base) : next_(static_cast<unsigned char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += (count * static_cast<int64_t>(sizeof(T)) + 127) / 128 * 128;
    return array;
  }

 private:
  unsigned char* next_;
};

}  // namespace esokern::cuda
