// Threads: fibres, their schedule, the block's barrier, launches and errors.
#include "emulator.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <random>
#include <stdexcept>

#include "fibre.h"
#include "machine.h"

namespace esokern::emulator {

Builtins builtins;
Machine machine;
Checker* checker = nullptr;

namespace {

enum class Schedule { in_order, reverse, random, starving };

struct Settings {
  Schedule schedule = Schedule::in_order;
  uint64_t seed = 0;
  int multiprocessors = 4;
  int64_t step_limit = 100'000'000;
} settings;

std::mutex one_launch;  // at a time
Stacks stacks;
Fibre fibres[kMaxThreads], host;
void (*kernel_body)(const void*);
const void* kernel_context;
uint32_t ready_warps;
std::string error;

// splitmix64
struct Random {
  uint64_t state = 0;
  uint64_t operator()() {
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  using result_type = uint64_t;
  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return ~uint64_t{0}; }
} random_bits;

int warps() {
  return (machine.threads + kWarp - 1) / kWarp;
}

int lowest(uint32_t bits) {
  return __builtin_ctz(bits);
}
int highest(uint32_t bits) {
  return 31 - __builtin_clz(bits);
}
int any_of(uint32_t bits) {
  for (auto skip = random_bits() % __builtin_popcount(bits); skip > 0; --skip) bits &= bits - 1;
  return lowest(bits);
}

// --- who runs next

// Warps in the order in which "starving" prefers them, for `picks_left` more picks.
struct Preference {
  int order[kMaxThreads / kWarp];
  int picks_left = 0;
} preference;

int pick_starving_warp() {
  const int count = warps();
  if (preference.picks_left-- <= 0) {
    for (int i = 0; i < count; ++i) preference.order[i] = i;
    std::shuffle(preference.order, preference.order + count, random_bits);
    preference.picks_left = kWarp << random_bits() % 7;
  }
  for (int i = 0;; ++i)
    if (ready_warps >> preference.order[i] & 1) return preference.order[i];
}

// Among those that can run, of which there is at least one. A warp goes on until it waits, except in "random".
int pick_thread() {
  const int thread = current(), warp = thread / kWarp, lane = thread % kWarp;
  const uint32_t mine = machine.warp[warp].ready;
  switch (settings.schedule) {
    case Schedule::in_order: {
      if (const uint32_t later = mine & (~0u << lane)) return warp * kWarp + lowest(later);
      if (mine != 0) return warp * kWarp + lowest(mine);
      const uint32_t later = ready_warps & (~0u << warp);
      const int next = lowest(later != 0 ? later : ready_warps);
      return next * kWarp + lowest(machine.warp[next].ready);
    }
    case Schedule::reverse: {
      const int next = mine != 0 ? warp : highest(ready_warps);
      return next * kWarp + highest(machine.warp[next].ready);
    }
    case Schedule::random: {
      const int next = any_of(ready_warps);
      return next * kWarp + any_of(machine.warp[next].ready);
    }
    case Schedule::starving: {
      const int next = pick_starving_warp();
      return next * kWarp + lowest(machine.warp[next].ready);
    }
  }
  __builtin_unreachable();
}

std::string who_waits_where() {
  std::string text;
  for (int w = 0; w < warps(); ++w)
    for (int lane = 0, first = 0; lane < kWarp; lane = first) {
      const Thread& thread = machine.thread[w * kWarp + lane];
      auto same = [&](int other) {
        const Thread& o = machine.thread[w * kWarp + other];
        return o.waits_for == thread.waits_for && o.waits_at == thread.waits_at;
      };
      for (first = lane + 1; first < kWarp && same(first);) ++first;
      if (thread.waits_for == nullptr) continue;
      text += "\n  warp " + std::to_string(w) + " lanes " + std::to_string(lane) + "-" +
              std::to_string(first - 1) + ": " + thread.waits_for + " at " + describe(thread.waits_at);
    }
  return text;
}

// Leaves the running fibre for the next one, or for the host if all have exited.
ESOKERN_LEAVES_FRAME void switch_away() {
  const int from = current();
  if (machine.alive == 0) {
    machine.running = false;
    fibres[from].switch_to(host);
    return;
  }
  if (ready_warps == 0) fail(machine.thread[from].waits_at, "deadlock: nobody can go on" + who_waits_where());
  const int to = pick_thread();
  if (to == from) return;
  builtins.thread_index.x = static_cast<unsigned>(to);
  fibres[from].switch_to(fibres[to]);
}

void finish_barrier_if_complete() {
  if (machine.at_barrier == 0 || machine.at_barrier < machine.alive) return;
  machine.at_barrier = 0;
  if (checker != nullptr) checker->block_barrier();
  for (int w = 0; w < warps(); ++w) wake_warp(w, machine.warp[w].alive);
}

// What every fibre runs.
ESOKERN_LEAVES_FRAME void thread_main() {
  Fibre::arrived(machine.running ? nullptr : &host);
  machine.running = true;
  kernel_body(kernel_context);
  check_no_copies_pending();
  const int thread = current();
  Warp& warp = machine.warp[thread / kWarp];
  warp.alive &= ~(1u << thread % kWarp);
  warp.ready &= ~(1u << thread % kWarp);
  if (warp.ready == 0) ready_warps &= ~(1u << thread / kWarp);
  --machine.alive;
  // Those who wait for the others need not wait for this one any more.
  finish_collective_if_complete(thread / kWarp);
  finish_barrier_if_complete();
  switch_away();
  __builtin_unreachable();
}

void run_block(int64_t block) {
  machine.alive = machine.threads;
  machine.at_barrier = 0;
  machine.steps = 0;
  ready_warps = 0;
  for (int w = 0; w < warps(); ++w) {
    const int lanes = std::min(kWarp, machine.threads - w * kWarp);
    machine.warp[w].alive = machine.warp[w].ready = static_cast<uint32_t>((uint64_t{1} << lanes) - 1);
    machine.warp[w].arrived = 0;
    ready_warps |= 1u << w;
  }
  for (int i = 0; i < warps() * kWarp; ++i) {
    machine.thread[i].waits_for = nullptr;
    machine.thread[i].groups = 0;
    machine.thread[i].copies.clear();
    if (i < machine.threads) fibres[i].prepare(stacks.bottom(i), stacks.bytes(i), thread_main);
  }
  begin_shared_memory();
  if (checker != nullptr) checker->begin_block(block);
  builtins.thread_index.x = settings.schedule == Schedule::reverse ? machine.threads - 1 : 0;
  const int first = pick_thread();
  builtins.thread_index.x = static_cast<unsigned>(first);
  host.switch_to(fibres[first]);
  if (error.empty()) end_shared_memory();
}

}  // namespace

// --- for the primitives

void step(Site site) {
  if (++machine.steps > settings.step_limit)
    fail(site,
         "the block has not ended after " + std::to_string(settings.step_limit) + " steps: an endless loop?");
}

void wait_for(const char* what, Site site) {
  const int thread = current();
  Warp& warp = machine.warp[thread / kWarp];
  machine.thread[thread].waits_for = what;
  machine.thread[thread].waits_at = site;
  warp.ready &= ~(1u << thread % kWarp);
  if (warp.ready == 0) ready_warps &= ~(1u << thread / kWarp);
  switch_away();
}

void wake_warp(int w, uint32_t lanes) {
  machine.warp[w].ready |= lanes;
  if (lanes != 0) ready_warps |= 1u << w;
  for (; lanes != 0; lanes &= lanes - 1) machine.thread[w * kWarp + lowest(lanes)].waits_for = nullptr;
}

void block_sync(Site site) {
  step(site);
  if (machine.at_barrier == 0) machine.barrier_site = site;
  if (machine.barrier_site != site)
    fail(site, "block_sync in a divergent branch: other threads wait at " + describe(machine.barrier_site));
  if (++machine.at_barrier < machine.alive) return wait_for("block_sync", site);
  finish_barrier_if_complete();
}

bool is_stack(const void* address) {
  return stacks.contains(address);
}

// --- errors

// "file.cu:12", of a code address by addr2line with the functions it was inlined into.
std::string describe(Site site) {
  const char* name = reinterpret_cast<const char*>(site & ((Site{1} << 48) - 1));
  const unsigned line = static_cast<unsigned>(site >> 48);
  auto base = [](const char* path) {
    const char* slash = strrchr(path, '/');
    return std::string(slash != nullptr ? slash + 1 : path);
  };
  if (line != 0) return base(name) + ":" + std::to_string(line);
  Dl_info module;
  if (name == nullptr || dladdr(name, &module) == 0) return "an unknown place";
  char command[4096], place[1024];
  snprintf(command, sizeof(command), "addr2line -i -e '%s' %#zx 2>/dev/null", module.dli_fname,
           static_cast<size_t>(name - static_cast<const char*>(module.dli_fbase)) - 1);
  std::string text;
  if (FILE* output = popen(command, "r")) {
    while (fgets(place, sizeof(place), output) != nullptr) {
      place[strcspn(place, " \n")] = 0;
      if (place[0] != '?') text += (text.empty() ? "" : " in ") + base(place);
    }
    pclose(output);
  }
  return text.empty() ? base(module.dli_fname) + " (compile with -g for lines)" : text;
}

std::string thread_name(int thread) {
  return "thread " + std::to_string(thread) + " (warp " + std::to_string(thread / kWarp) + " lane " +
         std::to_string(thread % kWarp) + ")";
}

void fail(Site site, const std::string& what) {
  const Index3 block = builtins.block_index;
  std::string text = std::string("kernel ") + machine.kernel + ": ";
  if (site != 0) text += describe(site) + ": ";
  text += "block (" + std::to_string(block.x) + ", " + std::to_string(block.y) + ", " +
          std::to_string(block.z) + ")";
  if (machine.running) text += " " + thread_name(current());
  text += ": " + what;
  if (!machine.running) throw std::runtime_error(text);
  error = text;
  machine.running = false;
  fibres[current()].switch_to(host);
  __builtin_unreachable();
}

// --- launches

void run(const char* kernel, const int64_t (&grid)[3], int threads, int64_t shared_bytes,
         void (*body)(const void*), const void* context) {
  const std::lock_guard<std::mutex> lock(one_launch);
  auto refuse = [&](const std::string& why) {
    throw std::runtime_error(std::string("kernel ") + kernel + ": " + why);
  };
  if (threads < 1 || threads > kMaxThreads) refuse(std::to_string(threads) + " threads per block");
  if (shared_bytes < 0 || shared_bytes > kMaxSharedBytes)
    refuse(std::to_string(shared_bytes) + " bytes of shared memory, more than every GPU has");
  machine.kernel = kernel;
  machine.threads = threads;
  machine.shared_bytes = shared_bytes;
  kernel_body = body;
  kernel_context = context;
  auto extent = [](int64_t n) { return static_cast<unsigned>(n); };
  builtins.grid_dim = {extent(grid[0]), extent(grid[1]), extent(grid[2])};
  builtins.block_dim = {extent(threads), 1, 1};
  builtins.thread_index = {0, 0, 0};
  random_bits.state = settings.seed;
  preference.picks_left = 0;
  stacks.grow(threads);
  error.clear();
  if (checker != nullptr) checker->begin_launch();

  std::vector<int64_t> blocks(grid[0] * grid[1] * grid[2]);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<int64_t>(i);
  if (settings.schedule == Schedule::reverse) std::reverse(blocks.begin(), blocks.end());
  if (settings.schedule >= Schedule::random) std::shuffle(blocks.begin(), blocks.end(), random_bits);
  for (const int64_t block : blocks) {
    builtins.block_index = {extent(block % grid[0]), extent(block / grid[0] % grid[1]),
                            extent(block / grid[0] / grid[1])};
    run_block(block);
    if (error.empty()) continue;
    stacks.forget_frames();
    throw std::runtime_error(error);
  }
}

// --- control

void set_schedule(const std::string& name, uint64_t seed) {
  const char* const names[] = {"in_order", "reverse", "random", "starving"};
  const auto* found = std::find(std::begin(names), std::end(names), name);
  if (found == std::end(names))
    throw std::invalid_argument("schedule: in_order, reverse, random or starving");
  settings.schedule = static_cast<Schedule>(found - names);
  settings.seed = seed;
}

void set_multiprocessors(int count) {
  settings.multiprocessors = count;
}
int multiprocessors() {
  return settings.multiprocessors;
}

void set_step_limit(int64_t steps) {
  settings.step_limit = steps;
}

const char* built_with() {
#if defined(__SANITIZE_ADDRESS__)
  return "asan";
#else
  return checker != nullptr ? "race" : "plain";
#endif
}

}  // namespace esokern::emulator
