// Errors of the kernels. ESOKERN_CHECK throws std::invalid_argument, which Python sees as ValueError.
// The throwing function is out of line so that no std:: code is compiled per instruction set.
#pragma once

namespace esokern {
[[noreturn]] void check_failed(const char* message);
[[noreturn]] void check_failed(const char* message, long long got);
}  // namespace esokern

// ESOKERN_CHECK(condition, "what is supported") or (condition, "... got", value)
#define ESOKERN_CHECK(condition, ...)                       \
  do {                                                      \
    if (!(condition)) ::esokern::check_failed(__VA_ARGS__); \
  } while (0)
