// Fibres: stacks of their own, switched by hand. Included by emulator.cpp only.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

// ESOKERN_LEAVES_FRAME: for functions whose frame is left for good. ASan's red zones in it would outlive the fibre.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ESOKERN_LEAVES_FRAME __attribute__((no_sanitize("address"), noinline))
#else
#define ESOKERN_LEAVES_FRAME
#endif

#if defined(__x86_64__)
// Saves the registers that a call preserves, swaps stacks, restores.
extern "C" void esokern_emulator_switch(void** save_sp, void* load_sp);
asm(R"(
.text
.hidden esokern_emulator_switch
.globl esokern_emulator_switch
.type esokern_emulator_switch, @function
esokern_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size esokern_emulator_switch, .-esokern_emulator_switch
)");
#else
#include <ucontext.h>
#endif

namespace esokern::emulator {

class Fibre {
 public:
  // The next switch to this fibre calls entry() on the given stack; entry must not return.
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    stack_ = stack;
    bytes_ = bytes;
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // entry's return address, which also aligns its frame
    *--top = reinterpret_cast<void*>(entry);
    sp_ = top - 6;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  ESOKERN_LEAVES_FRAME void switch_to(Fibre& next) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, next.stack_, next.bytes_);
#endif
#if defined(__x86_64__)
    esokern_emulator_switch(&sp_, next.sp_);
#else
    swapcontext(&context_, &next.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  // To be called first by entry(). `host`: who switched here, if it runs on a stack that was not prepared; ASan
  // tells where that is.
  static void arrived([[maybe_unused]] Fibre* host) {
#if defined(__SANITIZE_ADDRESS__)
    const void* stack;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
    if (host == nullptr) return;
    host->stack_ = static_cast<const char*>(stack);
    host->bytes_ = bytes;
#endif
  }

 private:
  const char* stack_ = nullptr;
  size_t bytes_ = 0;
#if defined(__x86_64__)
  void* sp_ = nullptr;
#else
  ucontext_t context_;
#endif
};

// All stacks in one range of addresses, with a page between them that must not be touched.
class Stacks {
 public:
  static constexpr size_t kBytes = 256 * 1024, kGuard = 4096;

  void grow(int count) {
    if (base_ == nullptr) {
      void* range =
          mmap(nullptr, kBytes * kMaxCount, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (range == MAP_FAILED) throw std::runtime_error("emulator: no memory for stacks");
      base_ = static_cast<char*>(range);
    }
    for (; count_ < count; ++count_)
      if (mprotect(base_ + count_ * kBytes + kGuard, kBytes - kGuard, PROT_READ | PROT_WRITE) != 0)
        throw std::runtime_error("emulator: no memory for stacks");
  }

  char* bottom(int i) const { return base_ + i * kBytes + kGuard; }
  // Tops are spread over the sets of the caches: with equal low bits all stacks would fight for a few lines.
  static size_t bytes(int i) { return kBytes - kGuard - static_cast<size_t>(i) * 2368 % 65536 / 64 * 64; }
  bool contains(const void* address) const {
    return static_cast<size_t>(static_cast<const char*>(address) - base_) < kBytes * kMaxCount;
  }
  // Frames that were abandoned leave their red zones behind.
  void forget_frames() {
#if defined(__SANITIZE_ADDRESS__)
    for (int i = 0; i < count_; ++i) __asan_unpoison_memory_region(bottom(i), kBytes - kGuard);
#endif
  }

 private:
  static constexpr int kMaxCount = 1024;
  char* base_ = nullptr;
  int count_ = 0;
};

}  // namespace esokern::emulator
