// From the dtype of a tensor to the C++ type of its elements: body(float{}), body(bf16{}) or body(f16{}).
#pragma once

#include "tensor.h"

namespace esokern::cpu::ESOKERN_ISA {
namespace {

template <class Body>
void dispatch_dtype(DType dtype, const Body& body) {
  if (dtype == DType::f32) return body(float{});
  if (dtype == DType::bf16) return body(bf16{});
  if (dtype == DType::f16) return body(f16{});
  ESOKERN_CHECK(false, "supported dtypes are float32, bfloat16 and float16; DType",
                static_cast<long long>(dtype));
}

}  // namespace
}  // namespace esokern::cpu::ESOKERN_ISA
