// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a counter-based
// generator. Four words out of a 128-bit counter and a 64-bit key, no state, the same on every machine.
// `N` names the number type: Scalar (common/gumbel.h) for one stream, NoiseVec (cpu/simd.h) for one per lane.
#pragma once

#include <cstdint>

#include "common/hd.h"

namespace esokern {

template <class N>
struct PhiloxWords {
  typename N::Uint word[4];
};

template <class N>
ESOKERN_HD PhiloxWords<N> philox4x32(typename N::Uint c0, typename N::Uint c1, typename N::Uint c2,
                                     typename N::Uint c3, typename N::Uint key0, typename N::Uint key1) {
  using Uint = typename N::Uint;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    Uint hi0, lo0, hi1, lo1;
    N::mul_hi_lo(c0, 0xD2511F53u, &hi0, &lo0);
    N::mul_hi_lo(c2, 0xCD9E8D57u, &hi1, &lo1);
    c0 = hi1 ^ c1 ^ key0;
    c1 = lo1;
    c2 = hi0 ^ c3 ^ key1;
    c3 = lo0;
    key0 = key0 + N::splat(0x9E3779B9u);
    key1 = key1 + N::splat(0xBB67AE85u);
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace esokern
