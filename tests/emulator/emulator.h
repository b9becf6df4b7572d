// A GPU for tests: kernels written against cuda/device.cuh, compiled by g++, run one block at a time on one OS
// thread, every CUDA thread a fibre. This file is what the rest of a test program may ask of it, and what the
// primitives in emulated_device.h call. How to use it: README.md.
#pragma once

#include <cstdint>
#include <string>

namespace esokern::emulator {

// --- control

// In which order threads that can run do run, and blocks:
//   "in_order"  by number          "reverse"   by number, downwards
//   "random"    any lane, any time  "starving"  some warps run far ahead of others, blocks shuffled
void set_schedule(const std::string& name, uint64_t seed = 0);
void set_multiprocessors(int count);  // what cuda::multiprocessors() says; 4 unless set
void set_step_limit(int64_t steps);   // scheduling steps of one block before it counts as hung
const char* built_with();             // "plain", "race" or "asan"
int64_t bank_conflicts();             // extra shared-memory passes of ldmatrix since the last reset
std::string bank_conflict_sites();    // the same by source line, worst first
void reset_bank_conflicts();

// --- a place in a kernel, for messages: a source line (line number in the upper 16 bits, the file's name below)
// or, with line 0, a code address.
using Site = uint64_t;

inline Site here(const char* file = __builtin_FILE(), unsigned line = __builtin_LINE()) {
  return static_cast<Site>(line) << 48 | reinterpret_cast<uintptr_t>(file);
}

// --- what kernels see

struct Index3 {
  unsigned x, y, z;
};
struct Builtins {
  Index3 thread_index, block_index, block_dim, grid_dim;
};
extern Builtins builtins;

// --- the primitives, as emulated_device.h calls them

void block_sync(Site site);
void warp_sync(Site site);
uint64_t shuffle(uint64_t value, unsigned source_lane, Site site);
uint32_t ballot(bool predicate, Site site);
void ldmatrix(uint32_t* r, uint32_t row, bool transposed, Site site);
void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool is_bf16, Site site);

// The index-th array of this thread's Arena, at `offset` of a GPU's shared memory.
void* take_shared(int index, int64_t offset, int64_t bytes, int64_t alignment, Site site);
uint32_t shared_address(const void* pointer, Site site);
void copy_async(uint32_t shared, const void* global, int bytes, bool valid, Site site);
void copy_async_commit(Site site);
void copy_async_wait(int pending_groups, Site site);

void load(void* to, const void* from, int bytes, Site site);
void store(void* to, const void* from, int bytes, Site site);
int32_t load_relaxed(const int32_t* from, Site site);
int32_t atomic_max(int32_t* at, int32_t value, Site site);
int32_t atomic_add(int32_t* at, int32_t value, Site site);
void fence(Site site);

int multiprocessors();
// Calls body(context) as every thread of every block. Throws std::runtime_error on the first fault.
void run(const char* kernel, const int64_t (&grid)[3], int threads, int64_t shared_bytes,
         void (*body)(const void*), const void* context);

}  // namespace esokern::emulator
