// The little that the bindings need of the CUDA runtime, without its headers.
#pragma once

namespace esokern::cuda {

// GPUs in reach; 0 if there is none or no driver that serves this build.
int device_count();

// Makes a device current, and the one before current again at the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_;
};

}  // namespace esokern::cuda
