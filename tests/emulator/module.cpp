// The CUDA back end's bindings over the emulator: the same functions as esokern._cuda, on CPU tensors, and the
// emulator's controls.
#include <pybind11/pybind11.h>

#include "cuda_backend.h"
#include "emulator.h"

PYBIND11_MODULE(ESOKERN_MODULE, m) {
  namespace emulator = esokern::emulator;
  using pybind11::arg;
  esokern::python::bind_cuda<esokern::python::dl::kCpu>(m);
  m.def("architectures", [] { return "the emulator"; });
  m.def("set_schedule", &emulator::set_schedule, arg("name"), arg("seed") = 0);
  m.def("set_multiprocessors", &emulator::set_multiprocessors, arg("count"));
  m.def("set_step_limit", &emulator::set_step_limit, arg("steps"));
  m.def("built_with", &emulator::built_with);
  m.def("bank_conflicts", &emulator::bank_conflicts);
  m.def("bank_conflict_sites", &emulator::bank_conflict_sites);
  m.def("reset_bank_conflicts", &emulator::reset_bank_conflicts);
}
