#include "check.h"

#include <stdexcept>
#include <string>

namespace esokern {
void check_failed(const char* message) {
  throw std::invalid_argument(message);
}
void check_failed(const char* message, long long got) {
  throw std::invalid_argument(std::string(message) + " (got " + std::to_string(got) + ")");
}
}  // namespace esokern
