#pragma once

#include <string>
#include <vector>

#include "ops.h"

namespace esokern::cpu {
std::vector<std::string> built_isas();
std::vector<std::string> supported_isas();
std::string get_isa();
void set_isa(const std::string& name);
}  // namespace esokern::cpu
