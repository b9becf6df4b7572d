// esokern._cpu. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "cpu/dispatch.h"

namespace {

struct Cpu {
  static constexpr int32_t kDeviceType = esokern::python::dl::kCpu;
#define ESOKERN_RUN(name, Args)                                                  \
  static void name(const esokern::python::Tensors&, const esokern::Args& args) { \
    pybind11::gil_scoped_release release;                                        \
    esokern::cpu::name(args);                                                    \
  }
  ESOKERN_OPS(ESOKERN_RUN)
#undef ESOKERN_RUN
};

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  esokern::python::bind_ops<Cpu>(m);
  m.def("built_isas", &esokern::cpu::built_isas);
  m.def("supported_isas", &esokern::cpu::supported_isas);
  m.def("get_isa", &esokern::cpu::get_isa);
  m.def("set_isa", &esokern::cpu::set_isa);
}
