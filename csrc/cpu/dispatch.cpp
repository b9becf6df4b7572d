// Which instruction set: the only file that asks which CPU this is. Decided once; set_isa() is for tests.
#include "cpu/dispatch.h"

#include <atomic>
#include <stdexcept>
#include <string>

namespace esokern::cpu {

#define ESOKERN_DECLARE(name, Args) void name(const Args&);
#define ESOKERN_DECLARE_ISA(isa) \
  namespace isa {                \
  ESOKERN_OPS(ESOKERN_DECLARE)   \
  }
ESOKERN_DECLARE_ISA(generic)
#ifdef ESOKERN_HAVE_avx2
ESOKERN_DECLARE_ISA(avx2)
ESOKERN_DECLARE_ISA(avx512)
ESOKERN_DECLARE_ISA(avx512bf16)
#endif

namespace {

struct Isa {
  const char* name;
  bool (*supported)();
#define ESOKERN_FIELD(name, Args) void (*name)(const Args&);
  ESOKERN_OPS(ESOKERN_FIELD)
};

#define ESOKERN_ENTRY_generic(name, Args) &generic::name,
#define ESOKERN_ENTRY_avx2(name, Args) &avx2::name,
#define ESOKERN_ENTRY_avx512(name, Args) &avx512::name,
#define ESOKERN_ENTRY_avx512bf16(name, Args) &avx512bf16::name,

// Worst first: the last one supported is chosen.
const Isa kIsas[] = {
    {"generic", [] { return true; }, ESOKERN_OPS(ESOKERN_ENTRY_generic)},
#ifdef ESOKERN_HAVE_avx2
    {"avx2", [] { return __builtin_cpu_supports("x86-64-v3") != 0; }, ESOKERN_OPS(ESOKERN_ENTRY_avx2)},
    {"avx512", [] { return __builtin_cpu_supports("x86-64-v4") != 0; }, ESOKERN_OPS(ESOKERN_ENTRY_avx512)},
    {"avx512bf16",
     [] { return __builtin_cpu_supports("x86-64-v4") != 0 && __builtin_cpu_supports("avx512bf16") != 0; },
     ESOKERN_OPS(ESOKERN_ENTRY_avx512bf16)},
#endif
};

const Isa* best_isa() {
  const Isa* best = &kIsas[0];
  for (const Isa& isa : kIsas)
    if (isa.supported()) best = &isa;
  return best;
}

std::atomic<const Isa*> current_isa{best_isa()};

}  // namespace

#define ESOKERN_DISPATCH(name, Args)                         \
  void name(const Args& args) {                              \
    current_isa.load(std::memory_order_relaxed)->name(args); \
  }
ESOKERN_OPS(ESOKERN_DISPATCH)

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) names.push_back(isa.name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas)
    if (isa.supported()) names.push_back(isa.name);
  return names;
}

std::string get_isa() {
  return current_isa.load()->name;
}

void set_isa(const std::string& name) {
  for (const Isa& isa : kIsas) {
    if (name != isa.name) continue;
    if (!isa.supported()) throw std::invalid_argument("isa: this CPU does not support '" + name + "'");
    current_isa = &isa;
    return;
  }
  std::string known;
  for (const Isa& isa : kIsas) known += std::string(known.empty() ? "" : ", ") + isa.name;
  throw std::invalid_argument("isa: got '" + name + "', built are: " + known);
}

}  // namespace esokern::cpu
