// How the ops of csrc/cuda are run for Python: in the order of the caller's stream, on the tensors' own device.
// Scratch comes from an allocator that the package sets, so that it belongs to the caller's framework and its graphs.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

#include "bindings.h"
#include "cuda/runtime.h"

namespace esokern::python {

// allocate(bytes, device index) -> uint8 tensor. Never destroyed: the interpreter may be gone before the module.
inline py::object& allocator() {
  static auto* callable = new py::object();
  return *callable;
}

template <class Args>
void run_cuda(const Tensors& tensors, const Args& args, int64_t (*workspace_bytes)(const Args&),
              void (*op)(const Args&, void*, void*)) {
  const cuda::DeviceGuard guard(tensors.device());
  const int64_t bytes = workspace_bytes(args);
  py::object scratch;
  void* workspace = nullptr;
  if (bytes > 0) {
    if (!allocator())
      throw std::runtime_error("the cuda back end has no allocator; set_allocator was not called");
    scratch = allocator()(bytes, tensors.device());
    workspace = Tensors(tensors.device_type())(scratch).data;
  }
  void* stream = tensors.stream();
  py::gil_scoped_release release;
  op(args, workspace, stream);
}

// kDevice: where the tensors lie, kCuda (or kCpu under the emulator of tests/emulator).
template <int32_t kDevice>
struct Cuda {
  static constexpr int32_t kDeviceType = kDevice;
#define ESOKERN_RUN(name, Args)                                          \
  static void name(const Tensors& tensors, const Args& args) {           \
    run_cuda<Args>(tensors, args, &cuda::name##_workspace, &cuda::name); \
  }
  ESOKERN_OPS(ESOKERN_RUN)
#undef ESOKERN_RUN
};

template <int32_t kDevice>
void bind_cuda(py::module_& m) {
  bind_ops<Cuda<kDevice>>(m);
  m.def("set_allocator", [](py::object callable) { allocator() = std::move(callable); });
  m.def("device_count", &cuda::device_count);
}

}  // namespace esokern::python
