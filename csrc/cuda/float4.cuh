// Four numbers as one access of 16 bytes, to shared memory above all.
#pragma once

namespace esokern::cuda {
namespace {

struct alignas(16) Float4 {
  float value[4];
};

}  // namespace
}  // namespace esokern::cuda
