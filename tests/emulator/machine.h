// The state of the emulated GPU: what emulator.cpp (threads), warp.cpp (collectives), memory.cpp and race.cpp share.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "emulator.h"

namespace esokern::emulator {

constexpr int kWarp = 32, kMaxThreads = 1024;

// A cp.async under way.
struct Copy {
  uint32_t shared;
  int bytes;
  const void* global;  // nullptr: zeros
  int64_t group;
  Site site;
};

struct Thread {
  const char* waits_for = nullptr;  // nullptr: can run, or has exited
  Site waits_at = 0;
  int64_t groups = 0;        // closed so far
  std::vector<Copy> copies;  // not yet landed, oldest first
};

enum class Op : int { shuffle, ballot, warp_sync, ldmatrix, ldmatrix_trans, mma_bf16, mma_f16 };

// What a lane brings to a collective, and gets.
struct Lane {
  uint64_t value;
  unsigned source;
  uint32_t a[4], b[2];
  float* d;
  uint32_t* r;
};

struct Warp {
  uint32_t alive = 0, ready = 0;
  uint32_t arrived = 0;  // at the collective that is being gathered
  Op op;
  Site site;
  Lane lane[kWarp];
};

// An array of the Arena: at `offset` on a GPU, at `address` here, equal modulo 1024, with red zones around.
struct Array {
  int64_t offset, bytes;
  uint32_t address;
};

// Shared memory is one segment; addresses count from its start.
constexpr uint32_t kSegmentBytes = 256 * 1024, kRedZone = 1024;
constexpr int64_t kMaxSharedBytes = 99 * 1024;
alignas(1024) extern unsigned char segment[kSegmentBytes];

struct Machine {
  const char* kernel = "";
  int threads = 0, alive = 0;
  int64_t shared_bytes = 0;
  int64_t steps = 0;
  bool running = false;  // inside a kernel, as opposed to the host
  Warp warp[kMaxThreads / kWarp];
  Thread thread[kMaxThreads];
  std::vector<Array> arrays;
  int at_barrier = 0;
  Site barrier_site = 0;
};
extern Machine machine;

inline int current() {
  return static_cast<int>(builtins.thread_index.x);
}

// Ends the launch with an error about the running thread. From the primitives only.
[[noreturn]] void fail(Site site, const std::string& what);
std::string describe(Site site);
// "thread 5 (warp 0 lane 5)"
std::string thread_name(int thread);
// "array 2 + 0x40 of 0x400 bytes", or where else the address lies.
std::string shared_name(int64_t address);
// Counts towards the step limit, for what could be called in an endless loop.
void step(Site site);
// The running thread waits until wake() or for good.
void wait_for(const char* what, Site site);
void wake_warp(int warp, uint32_t lanes);

// The warp's collective, if nobody is missing.
void finish_collective_if_complete(int warp);
// Bounds and alignment of [address, address + bytes) in shared memory.
void check_shared(uint32_t address, int bytes, Site site);
bool in_segment(const void* pointer);

// memory.cpp, for the frame of a block
void begin_shared_memory();
void end_shared_memory();
void check_no_copies_pending();

bool is_stack(const void* address);

// What the race build watches. Threads are named because the last lane to arrive acts for its warp.
struct Checker {
  enum Kind { kRead, kWrite, kAtomic };
  virtual ~Checker() = default;
  virtual void begin_launch() = 0;
  virtual void begin_block(int64_t block) = 0;
  virtual void access(int thread, const void* at, int bytes, Kind kind, Site site) = 0;
  virtual void copy_issued(const Copy& copy) = 0;
  virtual void copy_landed(const Copy& copy) = 0;
  virtual void block_barrier() = 0;
  virtual void warp_barrier(int warp, uint32_t lanes) = 0;
  virtual void atomic(const void* at, bool writes) = 0;
  virtual void fence() = 0;
};
extern Checker* checker;  // nullptr except in the race build

}  // namespace esokern::emulator
