// Run-time values to template parameters, on the host.
#pragma once

#include "check.h"
#include "tensor.h"

namespace esokern::cuda {

// body.template operator()<T>() for the storage type.
template <class Body>
void dispatch_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body.template operator()<float>();
    case DType::bf16:
      return body.template operator()<bf16>();
    case DType::f16:
      return body.template operator()<f16>();
    default:
      check_failed("the cuda back end takes float32, bfloat16 and float16");
  }
}

// body.template operator()<kHeadDim>() for the smallest kHeadDim that holds head_dim, which is a multiple of 8.
template <class Body>
void dispatch_head_dim(int64_t head_dim, const Body& body) {
  ESOKERN_CHECK(head_dim % 8 == 0 && head_dim > 0 && head_dim <= 256,
                "head_dim: supported are multiples of 8 up to 256", head_dim);
  if (head_dim <= 64) return body.template operator()<64>();
  if (head_dim <= 96) return body.template operator()<96>();
  if (head_dim <= 128) return body.template operator()<128>();
  return body.template operator()<256>();
}

}  // namespace esokern::cuda
