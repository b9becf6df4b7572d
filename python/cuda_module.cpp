// esokern._cuda: a module of its own, loaded when first needed, so that a machine without a GPU never meets it.
#include <pybind11/pybind11.h>

#include <string>

#include "cuda_backend.h"

PYBIND11_MODULE(_cuda, m) {
  esokern::python::bind_cuda<esokern::python::dl::kCuda>(m);
  m.def("architectures", [] { return std::string(ESOKERN_CUDA_ARCHITECTURES); });
}
