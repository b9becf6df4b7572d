// The race build: finds accesses to the same bytes that nothing orders, whatever the schedule was. Kernels are
// compiled with -fsanitize=thread, which calls a hook at every load and store; the hooks are here instead of in
// libtsan, and know CUDA's own edges only: block_sync and warp_sync within a block, fence + atomic between blocks.
//
// A thread's time is (epoch, warp epoch): barriers of the block so far, counted on over the blocks of a launch,
// and warp_syncs since the last one. All who take part in a barrier agree on it, so two numbers do for vector clocks.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <unordered_map>

#include "machine.h"

namespace esokern::emulator {
namespace {

struct Stamp {
  uint64_t thread : 10;
  uint64_t epoch : 28;  // 0: never
  uint64_t warp_epoch : 16;
  uint64_t fences : 6;     // that the thread had done, stops at kManyFences
  uint64_t atomic : 1;     // a write that atomics may overlap
  uint64_t flying : 1;     // a write by a copy that has not landed
  uint64_t lanes_too : 1;  // a read that other lanes of the warp did at the same time, too
  uint64_t warps_too : 1;  // a read that other warps did in the same epoch, too

  int warp() const { return static_cast<int>(thread / kWarp); }
};
static_assert(sizeof(Stamp) == 8);
constexpr uint64_t kManyFences = 63;

// What happened last to some bytes.
struct Cell {
  Stamp write, read;   // read: since the write
  Stamp earlier_read;  // since the write, by an earlier block
  Site write_site, read_site, earlier_read_site;
};

// 16 bytes, in 16 >> shift cells of equal size: one as long as all accesses are whole.
struct Line {
  Cell whole;
  Cell* parts;
  int shift;
};
constexpr int kLineBytes = 16, kPageBytes = 4096, kPageLines = kPageBytes / kLineBytes;
struct Page {
  Line line[kPageLines];
};

// What an atomic of a thread hands on: all that came before its last fence.
struct Release {
  int thread;
  uint64_t epoch, warp_epoch, fences;
};
using Releases = std::vector<Release>;  // of one address, in order of time

// The first `count` of `releases` are known to `thread` and, by its barriers, to its block.
struct Acquire {
  const Releases* releases;
  size_t count;
  int thread;
  uint64_t epoch, warp_epoch;
};

struct Clock {
  uint64_t epoch, warp_epoch, fences;
  uint64_t fence_epoch, fence_warp_epoch;
  std::vector<Acquire> unfenced;  // read from atomics since the last fence
};

class RaceChecker : public Checker {
 public:
  RaceChecker() { checker = this; }

  void begin_launch() override {
    epoch_ = 0;
    blocks_.clear();
    pages_.clear();
    last_page_ = nullptr;
    parts_.clear();
    parts_used_ = kPartsPerSlab;
    releases_.clear();
  }

  void begin_block(int64_t block) override {
    block_start_ = ++epoch_;
    blocks_.push_back({block_start_, block});
    acquires_.clear();
    for (int i = 0; i < machine.threads; ++i) {
      clock_[i].epoch = block_start_;
      clock_[i].warp_epoch = clock_[i].fences = clock_[i].fence_epoch = clock_[i].fence_warp_epoch = 0;
      clock_[i].unfenced.clear();
    }
  }

  void block_barrier() override {
    ++epoch_;
    for (int i = 0; i < machine.threads; ++i)
      if (machine.warp[i / kWarp].alive >> i % kWarp & 1) {
        clock_[i].epoch = epoch_;
        clock_[i].warp_epoch = 0;
      }
  }

  void warp_barrier(int warp, uint32_t lanes) override {
    for (int lane = 0; lane < kWarp; ++lane)
      if (lanes >> lane & 1) ++clock_[warp * kWarp + lane].warp_epoch;
  }

  void fence() override {
    Clock& clock = clock_[current()];
    clock.fences = std::min(clock.fences + 1, kManyFences);
    clock.fence_epoch = clock.epoch;
    clock.fence_warp_epoch = clock.warp_epoch;
    for (Acquire acquire : clock.unfenced) {
      acquire.epoch = clock.epoch;
      acquire.warp_epoch = clock.warp_epoch;
      acquires_.push_back(acquire);
    }
    clock.unfenced.clear();
  }

  void atomic(const void* at, bool writes) override {
    Clock& clock = clock_[current()];
    Releases& releases = releases_[at];
    std::erase_if(clock.unfenced, [&](const Acquire& a) { return a.releases == &releases; });
    clock.unfenced.push_back({&releases, releases.size(), current(), 0, 0});
    if (writes && clock.fences > 0)
      releases.push_back({current(), clock.fence_epoch, clock.fence_warp_epoch, clock.fences});
  }

  void access(int thread, const void* at, int bytes, Kind kind, Site site) override {
    thread_ = thread;
    for_cells(at, bytes, [&](Cell& cell, uintptr_t address) {
      if (cell.write.flying && known(cell.write)) in_flight(cell, address, kind, site);
      if (kind == kRead)
        read(cell, address, site);
      else
        write(cell, address, kind == kAtomic, site);
    });
  }

  void copy_issued(const Copy& copy) override {
    access(current(), segment + copy.shared, copy.bytes, kWrite, copy.site);
    for_cells(segment + copy.shared, copy.bytes, [&](Cell& cell, uintptr_t) { cell.write.flying = 1; });
  }

  void copy_landed(const Copy& copy) override {
    thread_ = current();
    for_cells(segment + copy.shared, copy.bytes, [&](Cell& cell, uintptr_t) { cell.write = now(); });
  }

  // A load or store of the kernel itself.
  void plain_access(const void* at, int bytes, Kind kind, const void* code) {
    if (!machine.running || is_stack(at)) return;
    if (at >= &builtins && at < &builtins + 1) return;
    const Site site = reinterpret_cast<uintptr_t>(code);
    if (in_segment(at)) {
      const auto address = static_cast<const unsigned char*>(at) - segment;
      const bool inside = std::any_of(machine.arrays.begin(), machine.arrays.end(), [&](const Array& array) {
        return address >= array.address && address + bytes <= array.address + array.bytes;
      });
      if (!inside) fail(site, "shared memory out of bounds: " + shared_name(address));
    }
    access(current(), at, bytes, kind, site);
  }

 private:
  static constexpr size_t kPartsPerSlab = 4096;

  // --- cells

  Line& line_of(uintptr_t address) {
    const uintptr_t number = address / kPageBytes;
    if (last_page_ == nullptr || number != last_page_number_) {
      auto& page = pages_[number];
      if (page == nullptr) {
        page = std::make_unique<Page>();  // all zero
        for (Line& line : page->line) line.shift = 4;
      }
      last_page_ = page.get();
      last_page_number_ = number;
    }
    return last_page_->line[address / kLineBytes % kPageLines];
  }

  Cell* new_parts(size_t count) {
    if (parts_used_ + count > kPartsPerSlab) {
      parts_.push_back(std::make_unique<Cell[]>(kPartsPerSlab));
      parts_used_ = 0;
    }
    Cell* parts = parts_.back().get() + parts_used_;
    parts_used_ += count;
    return parts;
  }

  template <class Body>
  void for_cells(const void* at, int bytes, const Body& body) {
    uintptr_t begin = reinterpret_cast<uintptr_t>(at);
    const uintptr_t end = begin + bytes;
    while (begin < end) {
      Line& line = line_of(begin);
      const int first = static_cast<int>(begin % kLineBytes);
      const int count = static_cast<int>(std::min<uintptr_t>(kLineBytes - first, end - begin));
      const int shift = __builtin_ctz(first | count | kLineBytes);
      if (shift < line.shift) {
        Cell* parts = new_parts(kLineBytes >> shift);
        for (int i = 0; i < kLineBytes >> shift; ++i)
          parts[i] = line.shift == 4 ? line.whole : line.parts[i >> (line.shift - shift)];
        line.parts = parts;
        line.shift = shift;
      }
      Cell* cells = line.shift == 4 ? &line.whole : line.parts;
      for (int i = first >> line.shift; i < (first + count + (1 << line.shift) - 1) >> line.shift; ++i)
        body(cells[i], begin - first + (static_cast<uintptr_t>(i) << line.shift));
      begin += count;
    }
  }

  // --- time

  Stamp now() const {
    const Clock& clock = clock_[thread_];
    return {static_cast<uint64_t>(thread_), clock.epoch, clock.warp_epoch, clock.fences, 0, 0, 0, 0};
  }

  bool this_block(Stamp a) const { return a.epoch >= block_start_; }
  bool known(Stamp a) const { return a.epoch != 0; }

  // Did what thread_ does now have to wait for `a`, of the same block?
  bool ordered_in_block(Stamp a) const {
    const Clock &me = clock_[thread_], &other = clock_[a.thread];
    if (a.thread == static_cast<uint64_t>(thread_)) return true;
    // A thread that has exited since takes part in no barrier.
    const bool went_on = other.epoch > a.epoch || other.warp_epoch > a.warp_epoch;
    if (a.epoch < me.epoch) return went_on;
    return went_on && a.warp() == thread_ / kWarp && a.warp_epoch < me.warp_epoch;
  }

  bool ordered_between_blocks(Stamp a) const {
    for (const Acquire& acquire : acquires_) {
      const Stamp gained = {
          static_cast<uint64_t>(acquire.thread), acquire.epoch, acquire.warp_epoch, 0, 0, 0, 0, 0};
      if (!ordered_in_block(gained)) continue;
      const auto end = acquire.releases->begin() + static_cast<std::ptrdiff_t>(acquire.count);
      auto release = std::lower_bound(acquire.releases->begin(), end, a.epoch,
                                      [](const Release& r, uint64_t epoch) { return r.epoch < epoch; });
      for (; release != end && block_of(release->epoch) == block_of(a.epoch); ++release)
        if (handed_on(a, *release)) return true;
    }
    return false;
  }

  static bool handed_on(Stamp a, const Release& r) {
    if (static_cast<int>(a.thread) == r.thread)
      return a.fences < r.fences || a.fences == kManyFences || (a.atomic && a.fences == r.fences);
    if (a.epoch != r.epoch) return a.epoch < r.epoch;
    return a.warp() == r.thread / kWarp && a.warp_epoch < r.warp_epoch;
  }

  int64_t block_of(uint64_t epoch) const {
    auto after = std::upper_bound(blocks_.begin(), blocks_.end(), epoch,
                                  [](uint64_t e, const auto& block) { return e < block.first; });
    return (after - 1)->second;
  }

  bool ordered(Stamp a) const {
    if (!known(a)) return true;
    return this_block(a) ? ordered_in_block(a) : ordered_between_blocks(a);
  }

  // --- the rules

  static bool is_shared(uintptr_t address) { return in_segment(reinterpret_cast<const void*>(address)); }

  void read(Cell& cell, uintptr_t address, Site site) {
    if (is_shared(address) && !this_block(cell.write))
      fail_at(site, "reads shared memory that nobody has written: ", address);
    if (!ordered(cell.write))
      race("reads what another thread has written", cell.write, cell.write_site, address, site);
    const Stamp me = now();
    Stamp& last = cell.read;
    if (last.epoch != me.epoch) {
      if (known(last) && !this_block(last)) {
        cell.earlier_read = last;
        cell.earlier_read_site = cell.read_site;
      }
    } else if (last.warp() != me.warp()) {
      last.warps_too = 1;
      return;
    } else if (last.warp_epoch >= me.warp_epoch) {
      last.lanes_too |= last.thread != me.thread;
      return;
    }
    const bool warps_too = last.epoch == me.epoch && last.warps_too;
    last = me;
    last.warps_too = warps_too;
    cell.read_site = site;
  }

  void write(Cell& cell, uintptr_t address, bool atomic, Site site) {
    if (is_shared(address) && !this_block(cell.write)) cell = {};
    const Stamp me = now();
    if (!(atomic && cell.write.atomic) && !ordered(cell.write))
      race("writes what another thread has written", cell.write, cell.write_site, address, site);
    if (!ordered(cell.earlier_read))
      race("overwrites what another thread has read", cell.earlier_read, cell.earlier_read_site, address,
           site);
    const bool crowd =
        cell.read.epoch == me.epoch &&
        (cell.read.warps_too || (cell.read.lanes_too && cell.read.warp_epoch == me.warp_epoch));
    if (crowd || !ordered(cell.read))
      race("overwrites what another thread has read", cell.read, cell.read_site, address, site, crowd);
    cell.read = cell.earlier_read = {};
    cell.write = me;
    cell.write.atomic = atomic;
    cell.write_site = site;
  }

  // --- reports

  static std::string name(uintptr_t address) {
    if (is_shared(address))
      return shared_name(static_cast<int64_t>(address - reinterpret_cast<uintptr_t>(segment)));
    char text[64];
    snprintf(text, sizeof(text), "global memory at %#zx", static_cast<size_t>(address));
    return text;
  }

  [[noreturn]] void fail_at(Site site, const std::string& what, uintptr_t address) const {
    const std::string who = thread_ == current() ? "" : "for " + thread_name(thread_) + ": ";
    fail(site, who + what + name(address));
  }

  [[noreturn]] void race(const std::string& what, Stamp a, Site earlier, uintptr_t address, Site site,
                         bool among_others = false) const {
    const bool same_block = this_block(a);
    std::string text = "race: " + what +
                       (same_block ? ", with no barrier between them"
                                   : ", with no fence + atomic on both sides between the blocks") +
                       ": earlier at " + describe(earlier) + " by ";
    if (!same_block) text += "block number " + std::to_string(block_of(a.epoch)) + " ";
    text += thread_name(static_cast<int>(a.thread)) + (among_others ? " and others" : "") + "; ";
    fail_at(site, text, address);
  }

  [[noreturn]] void in_flight(const Cell& cell, uintptr_t address, Kind kind, Site site) const {
    fail_at(site,
            std::string(kind == kRead ? "reads" : "writes") +
                " shared memory while an asynchronous copy to it, at " + describe(cell.write_site) + " by " +
                thread_name(static_cast<int>(cell.write.thread)) + ", is under way: ",
            address);
  }

  int thread_ = 0;  // who acts: not current() where a lane acts for its warp
  uint64_t epoch_ = 0, block_start_ = 0;
  std::vector<std::pair<uint64_t, int64_t>> blocks_;  // first epoch, number
  Clock clock_[kMaxThreads];
  std::vector<Acquire> acquires_;  // of this block, after the fence
  std::unordered_map<const void*, Releases> releases_;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  Page* last_page_ = nullptr;
  uintptr_t last_page_number_ = 0;
  std::vector<std::unique_ptr<Cell[]>> parts_;
  size_t parts_used_ = kPartsPerSlab;
} race_checker;

}  // namespace
}  // namespace esokern::emulator

// --- the compiler's hooks

#define HOOK(name, bytes, kind)                                                               \
  extern "C" void name(void* at) {                                                            \
    esokern::emulator::race_checker.plain_access(at, bytes, esokern::emulator::Checker::kind, \
                                                 __builtin_return_address(0));                \
  }
#define HOOKS(bytes)                               \
  HOOK(__tsan_read##bytes, bytes, kRead)           \
  HOOK(__tsan_write##bytes, bytes, kWrite)         \
  HOOK(__tsan_unaligned_read##bytes, bytes, kRead) \
  HOOK(__tsan_unaligned_write##bytes, bytes, kWrite)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* at, unsigned long bytes) {
  esokern::emulator::race_checker.plain_access(at, static_cast<int>(bytes), esokern::emulator::Checker::kRead,
                                               __builtin_return_address(0));
}
void __tsan_write_range(void* at, unsigned long bytes) {
  esokern::emulator::race_checker.plain_access(
      at, static_cast<int>(bytes), esokern::emulator::Checker::kWrite, __builtin_return_address(0));
}
}
