// Shared memory with red zones, asynchronous copies, and the accesses that are primitives.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "machine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

namespace esokern::emulator {

alignas(1024) unsigned char segment[kSegmentBytes];

namespace {

constexpr unsigned char kPoison = 0xFF;  // a NaN in every float format
uint32_t segment_end = kSegmentBytes;    // of what the last block may have touched

std::string hex(int64_t value) {
  char text[32];
  snprintf(text, sizeof(text), "%s%#llx", value < 0 ? "-" : "",
           static_cast<unsigned long long>(value < 0 ? -value : value));
  return text;
}

uint32_t end_of_arrays() {
  return machine.arrays.empty()
             ? kRedZone
             : machine.arrays.back().address + static_cast<uint32_t>(machine.arrays.back().bytes);
}

void check_alignment(const void* at, int bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(at) % bytes != 0)
    fail(site, "an access of " + std::to_string(bytes) + " bytes at an address that is not a multiple");
}

// A primitive's access through a pointer to either memory.
void check_pointer(const void* at, int bytes, [[maybe_unused]] bool writes, Site site) {
  check_alignment(at, bytes, site);
  if (in_segment(at)) return check_shared(shared_address(at, site), bytes, site);
  if (at == nullptr) fail(site, "an access through a null pointer");
#if defined(__SANITIZE_ADDRESS__)
  if (__asan_region_is_poisoned(const_cast<void*>(at), bytes) != nullptr)
    fail(site, std::string(writes ? "writes" : "reads") + " global memory out of bounds (AddressSanitizer)");
#endif
}

void watch(const void* at, int bytes, Checker::Kind kind, Site site) {
  if (checker != nullptr) checker->access(current(), at, bytes, kind, site);
}

void land(const Copy& copy) {
  if (checker != nullptr) checker->copy_landed(copy);
  if (copy.global != nullptr)
    memcpy(segment + copy.shared, copy.global, copy.bytes);
  else
    memset(segment + copy.shared, 0, copy.bytes);
}

int32_t atomic(int32_t* at, Site site) {
  step(site);
  check_pointer(at, 4, true, site);
  watch(at, 4, Checker::kAtomic, site);
  if (checker != nullptr) checker->atomic(at, true);
  return *at;
}

}  // namespace

// --- shared memory

bool in_segment(const void* pointer) {
  return static_cast<size_t>(static_cast<const unsigned char*>(pointer) - segment) < kSegmentBytes;
}

void begin_shared_memory() {
  ASAN_UNPOISON_MEMORY_REGION(segment, kSegmentBytes);
  memset(segment, kPoison, segment_end);
  ASAN_POISON_MEMORY_REGION(segment, kSegmentBytes);
  machine.arrays.clear();
}

// What plain stores have left between the arrays.
void end_shared_memory() {
  segment_end = end_of_arrays() + kRedZone;
  ASAN_UNPOISON_MEMORY_REGION(segment, kSegmentBytes);
  uint32_t begin = 0;
  for (size_t i = 0; i <= machine.arrays.size(); ++i) {
    const bool last = i == machine.arrays.size();
    const uint32_t end = last ? segment_end : machine.arrays[i].address;
    const unsigned char* written =
        std::find_if(segment + begin, segment + end, [](auto x) { return x != kPoison; });
    if (written != segment + end) {
      segment_end = kSegmentBytes;
      fail(0, "a store out of bounds of shared memory, seen when the block had ended: " +
                  shared_name(written - segment));
    }
    if (!last) begin = end + static_cast<uint32_t>(machine.arrays[i].bytes);
  }
}

void* take_shared(int index, int64_t offset, int64_t bytes, int64_t alignment, Site site) {
  if (alignment < 1 || alignment > 1024 || (alignment & (alignment - 1)) != 0)
    fail(site, "alignment " + std::to_string(alignment) + ": powers of two up to 1024 can be had");
  auto& arrays = machine.arrays;
  if (index == static_cast<int>(arrays.size())) {
    if (offset + bytes > machine.shared_bytes)
      fail(site, "too little shared memory: array " + std::to_string(index) + " ends at " +
                     std::to_string(offset + bytes) + ", the launch gave " +
                     std::to_string(machine.shared_bytes));
    const Array array{offset, bytes, static_cast<uint32_t>(offset) + (index + 1) * kRedZone};
    if (array.address + bytes + kRedZone > kSegmentBytes) fail(site, "too many arrays in shared memory");
    ASAN_UNPOISON_MEMORY_REGION(segment + array.address, bytes);
    arrays.push_back(array);
  }
  if (arrays[index].offset != offset || arrays[index].bytes != bytes)
    fail(site, "array " + std::to_string(index) +
                   " of shared memory differs from the one that another thread, or an " +
                   "earlier Arena, has taken");
  return segment + arrays[index].address;
}

uint32_t shared_address(const void* pointer, Site site) {
  if (!in_segment(pointer)) fail(site, "a pointer to shared memory is needed");
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - segment);
}

std::string shared_name(int64_t address) {
  std::string best = "outside of all arrays";
  int64_t nearest = kSegmentBytes;
  for (size_t i = 0; i < machine.arrays.size(); ++i) {
    const Array& array = machine.arrays[i];
    const int64_t into = address - array.address, beyond = std::max(-into, into - array.bytes + 1);
    if (beyond >= nearest) continue;
    nearest = beyond;
    best = "array " + std::to_string(i) + " of " + hex(array.bytes) + " bytes, offset " + hex(into);
  }
  return best;
}

void check_shared(uint32_t address, int bytes, Site site) {
  if (address % bytes != 0)
    fail(site,
         "a shared address that is no multiple of " + std::to_string(bytes) + ": " + shared_name(address));
  for (const Array& array : machine.arrays)
    if (address >= array.address && address + bytes <= array.address + array.bytes) return;
  fail(site, std::to_string(bytes) + " bytes of shared memory out of bounds: " + shared_name(address));
}

// --- asynchronous copies. Adversarial: the destination is poison from the call on, the data come at the wait.

void copy_async(uint32_t shared, const void* global, int bytes, bool valid, Site site) {
  check_shared(shared, bytes, site);
  if (valid) {
    if (in_segment(global)) fail(site, "the source of an asynchronous copy lies in shared memory");
    check_pointer(global, bytes, false, site);
    watch(global, bytes, Checker::kRead, site);
  }
  Thread& thread = machine.thread[current()];
  const Copy copy{shared, bytes, valid ? global : nullptr, thread.groups, site};
  if (checker != nullptr) checker->copy_issued(copy);
  memset(segment + shared, kPoison, bytes);
  thread.copies.push_back(copy);
}

void copy_async_commit(Site) {
  ++machine.thread[current()].groups;
}

void copy_async_wait(int pending_groups, Site) {
  Thread& thread = machine.thread[current()];
  auto copy = thread.copies.begin();
  for (; copy != thread.copies.end() && copy->group < thread.groups - pending_groups; ++copy) land(*copy);
  thread.copies.erase(thread.copies.begin(), copy);
}

void check_no_copies_pending() {
  const auto& copies = machine.thread[current()].copies;
  if (!copies.empty())
    fail(copies.front().site, "an asynchronous copy that the thread, now at its end, has never waited for");
}

// --- accesses that are primitives

void load(void* to, const void* from, int bytes, Site site) {
  check_pointer(from, bytes, false, site);
  watch(from, bytes, Checker::kRead, site);
  memcpy(to, from, bytes);
}

void store(void* to, const void* from, int bytes, Site site) {
  check_pointer(to, bytes, true, site);
  watch(to, bytes, Checker::kWrite, site);
  memcpy(to, from, bytes);
}

int32_t load_relaxed(const int32_t* from, Site site) {
  step(site);
  if (in_segment(from)) fail(site, "load_relaxed is for global memory");
  check_pointer(from, 4, false, site);
  if (checker != nullptr) checker->atomic(from, false);
  return *from;
}

int32_t atomic_max(int32_t* at, int32_t value, Site site) {
  const int32_t before = atomic(at, site);
  *at = std::max(before, value);
  return before;
}

int32_t atomic_add(int32_t* at, int32_t value, Site site) {
  const int32_t before = atomic(at, site);
  *at = static_cast<int32_t>(static_cast<uint32_t>(before) + static_cast<uint32_t>(value));
  return before;
}

void fence(Site) {
  if (checker != nullptr) checker->fence();
}

}  // namespace esokern::emulator
