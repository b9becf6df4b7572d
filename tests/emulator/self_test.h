// What self_test.cpp and faults.cpp share.
#pragma once

#include <string>

namespace esokern::self_test {

// One line of output; a failure is counted.
void check(bool passed, const std::string& name);

bool built_as(const char* flavour);

// The message with which body() fails, "" if it does not.
template <class Body>
std::string error_of(const Body& body) {
  try {
    body();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

void check_faults();  // faults.cpp

}  // namespace esokern::self_test
