// Threads: OpenMP, shared with torch's libgomp, so torch.set_num_threads() governs the kernels too.
#pragma once

#include <omp.h>

#include <cstdint>

#include "common/hd.h"

namespace esokern::cpu::ESOKERN_ISA {
namespace {

// body(i) for every i in [0, count); tasks are handed out one by one, so their results must not depend on who
// computes them. Runs in the caller's thread when there is one task.
template <class Body>
inline void parallel_for(int64_t count, const Body& body) {
  if (count == 1) return body(int64_t{0});
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < count; ++i) body(i);
}

inline int max_threads() {
  return omp_get_max_threads();
}
inline int thread_index() {
  return omp_get_thread_num();
}

}  // namespace
}  // namespace esokern::cpu::ESOKERN_ISA
