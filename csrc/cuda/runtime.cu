#include <cuda_runtime.h>

#include "cuda/device.cuh"
#include "cuda/runtime.h"

namespace esokern::cuda {

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

DeviceGuard::DeviceGuard(int device) : before_(device) {
  check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
  if (before_ != device)
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
  else
    before_ = -1;
}

DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) cudaSetDevice(before_);
}

}  // namespace esokern::cuda
