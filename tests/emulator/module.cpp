// The CUDA back end's bindings over the emulator: the same functions as esokern._cuda, on CPU tensors.
#include <pybind11/pybind11.h>

#include "cuda_backend.h"

PYBIND11_MODULE(ESOKERN_MODULE, m) {
  esokern::python::bind_cuda<esokern::python::dl::kCpu>(m);
}
