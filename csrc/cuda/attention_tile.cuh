// One block's work on tiles of keys: shared memory, loads, scores, values.
//
//   warp    kFew: the four warps share 16 lanes and split the keys of a tile; else each has 16 lanes and all keys
//   memory  a ring of kSlots tiles, in the order K0 V0 K1 V1 ...; rows of 16-byte chunks, XOR-swizzled so that eight
//           rows of one chunk lie in different banks
//   numbers bf16 and f16 by mma; what rounding takes from a rotated query, and with kFew from the weights, goes into a
//           second mma. float32 by FFMA on the same fragments: thread (g, t) holds lanes g, g + 8 and keys (or columns)
//           8 n + 2 t, 8 n + 2 t + 1
#pragma once

#include "cuda/attention_block.cuh"
#include "cuda/float4.cuh"

namespace esokern::cuda {
namespace {

// Rows of a head in shared memory: chunks of 16 bytes, swizzled.
template <class T, int kHeadDim>
struct TileRows {
  static constexpr int kRow = kHeadDim, kColumnTiles = kHeadDim / 8;
  static constexpr int kChunkElements = 16 / static_cast<int>(sizeof(T));
  static constexpr int kChunks = kHeadDim / kChunkElements;
  static constexpr int kFloatUnroll = kHeadDim == 256 ? 1 : 4;  // more would spill

  // Element (row, chunk) of a tile: chunks change places within groups of eight, or of four where rows end there.
  static constexpr int kGroup = kChunks % 8 == 0 ? 8 : 4;
  __device__ __forceinline__ static int at(int row, int chunk) {
    const int swizzled = kGroup == 8 ? chunk ^ (row & 7) : chunk ^ (row >> 1 & 3);
    return row * kHeadDim + swizzled * kChunkElements;
  }
  // From the shared address of (row, 0 or 1) to that of (row, `chunk` more), chunk even and constant. Rows 8 n further
  // lie n kEightRows bytes further.
  __device__ __forceinline__ static uint32_t further(uint32_t address, int chunk) {
    return (address ^ static_cast<uint32_t>(chunk % kGroup * 16)) +
           static_cast<uint32_t>(chunk / kGroup * kGroup * 16);
  }
  static constexpr int kEightRows = 8 * kHeadDim * static_cast<int>(sizeof(T));  // bytes
};

template <class T, int kHeadDim, bool kFew>
struct Tile : TileRows<T, kHeadDim> {
  using TileRows<T, kHeadDim>::kChunks;
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kLanes = kFew ? kFewLanes : kManyLanes;
  static constexpr int kBlockKV =
      kIsFloat<T> ? (kHeadDim <= 96 ? 64 : 32) : (!kFew && kHeadDim == 256 ? 32 : 64);
  static constexpr int kWarpKeys = kFew ? kBlockKV / kWarps : kBlockKV;
  static constexpr int kKeyTiles = kWarpKeys / 8;
  // Blocks per multiprocessor that registers must allow: as many as do not spill.
  static constexpr int kBlocks = kIsFloat<T> || kHeadDim >= 128 ? 2
                                 : kFew                         ? (kHeadDim == 64 ? 4 : 3)
                                 : kHeadDim == 64               ? 3
                                                                : 2;
  static constexpr int kMergeStride = kHeadDim + 8;  // floats; eight rows lie in different banks
  static constexpr int kTileBytes = kBlockKV * kHeadDim * static_cast<int>(sizeof(T));
  // As many as leave room for the blocks that registers allow; 24 KB and more under way in each.
  static constexpr int kSlots = kHeadDim == 256                                    ? 2
                                : kTileBytes > 16384 || (!kFew && kHeadDim == 128) ? 3
                                                                                   : 4;
  static constexpr bool kKeepQuery = !kIsFloat<T> && kHeadDim <= 128;  // query fragments stay in registers
  static constexpr int kKept = kKeepQuery ? kHeadDim / 16 : 1;

  struct Smem {
    T* ring;
    T* query;
    T* query_rest;      // what rounding took from `query`; only with rotation
    int32_t* rank;      // [kSlots][kBlockKV], of explicit ranks
    QueryRange* range;  // [kLanes]
    Block<T>* block;
    float* merge;    // [kLanes][kMergeStride]; kFew only, like the next
    float* row_max;  // [kWarps][kLanes]
    float* row_sum;

#pragma nv_exec_check_disable
    template <class Source>
    __host__ __device__ Smem(Source& source, bool rotation)
        : ring(source.template take<T>(kSlots * kBlockKV * kHeadDim)),
          query(source.template take<T>(kLanes * kHeadDim)),
          query_rest(!kIsFloat<T> && rotation ? source.template take<T>(kLanes * kHeadDim) : nullptr),
          rank(source.template take<int32_t>(kSlots * kBlockKV)),
          range(source.template take<QueryRange>(kLanes)),
          block(source.template take<Block<T>>(1)),
          merge(kFew ? source.template take<float>(kLanes * kMergeStride) : nullptr),
          row_max(kFew ? source.template take<float>(kWarps * kLanes) : nullptr),
          row_sum(kFew ? source.template take<float>(kWarps * kLanes) : nullptr) {}
  };
};

// Starts the copies of rows [begin, begin + kRows) into `tile`; zeros at and past `end` and head_dim. A thread has one
// place in a group of chunks and every kRowsAtOnce-th row, so that its swizzle never changes.
template <class Tile, int kRows, class T, class Rows>
__device__ __forceinline__ void load_tile(T* tile, const Rows& rows, int32_t begin, int32_t end, int head_dim,
                                          bool aligned) {
  constexpr int kRowsAtOnce = Tile::kThreads / Tile::kGroup, kStep = Tile::kGroup * Tile::kChunkElements;
  static_assert(kRows % kRowsAtOnce == 0 && kRowsAtOnce % 8 == 0);
  const int row = threadIdx.x / Tile::kGroup, chunk = threadIdx.x % Tile::kGroup;
  const int column = chunk * Tile::kChunkElements;
  T* to = tile + Tile::at(row, chunk);
  if (aligned) {
    const uint32_t place = smem_address(to);
#pragma unroll
    for (int pass = 0; pass < kRows; pass += kRowsAtOnce) {
      const int32_t j = begin + row + pass;
      const T* from = rows.at(j < end ? j : begin) + column;
#pragma unroll
      for (int c = 0; c < Tile::kRow; c += kStep)
        copy_async_16(place + static_cast<int>(sizeof(T)) * (pass * Tile::kRow + c), from + c,
                      j < end && column + c < head_dim);
    }
  } else {
#pragma unroll 1
    for (int pass = 0; pass < kRows; pass += kRowsAtOnce) {
      const int32_t j = begin + row + pass;
      const T* from = rows.at(j < end ? j : begin) + column;
#pragma unroll 1
      for (int c = 0; c < Tile::kRow; c += kStep)
#pragma unroll 1
        for (int e = 0; e < Tile::kChunkElements; ++e)
          to[pass * Tile::kRow + c + e] = j < end && column + c < head_dim ? from[c + e] : T{};
    }
  }
}

struct alignas(8) Float2 {
  float x[2];
};
// Four products are added among themselves first: a chain of 64 would round too often for float32.
__device__ __forceinline__ float dot(const Float4& a, const Float4& b) {
  return (a.value[0] * b.value[0] + a.value[1] * b.value[1]) +
         (a.value[2] * b.value[2] + a.value[3] * b.value[3]);
}

// scores[n] += queries of this warp times keys [first_key, first_key + kWarpKeys) of the tile, for float32.
template <class Tile>
__device__ __forceinline__ void score_floats(float (&scores)[Tile::kKeyTiles][4], const float* query,
                                             const float* keys, int first_key) {
  const int g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
  // Rows g and g + 8, and so all keys 8 n + 2 t and 8 n + 2 t + 1, have one swizzle each.
  const uint32_t query_at = Tile::at(g, 0);
  const uint32_t key_at[2] = {static_cast<uint32_t>(Tile::at(first_key + 2 * t, 0)),
                              static_cast<uint32_t>(Tile::at(first_key + 2 * t + 1, 0))};
#pragma unroll 1
  for (int group = 0; group < Tile::kChunks; group += 8)
#pragma unroll 2 * Tile::kFloatUnroll
    for (int chunk = 0; chunk < 8; ++chunk) {
      const float* row = query + group * 4 + (query_at ^ chunk * 4);
      const Float4 low = *reinterpret_cast<const Float4*>(row);
      const Float4 high = *reinterpret_cast<const Float4*>(row + 8 * Tile::kRow);
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int n = 0; n < Tile::kKeyTiles; ++n) {
          const Float4 key = *reinterpret_cast<const Float4*>(keys + group * 4 + (key_at[i] ^ chunk * 4) +
                                                              8 * n * Tile::kRow);
          scores[n][i] += dot(low, key);
          scores[n][2 + i] += dot(high, key);
        }
    }
}

// The same for halves. `query_rest` with kRest only.
template <class Tile, bool kRest, class T>
__device__ __forceinline__ void score_halves(float (&scores)[Tile::kKeyTiles][4],
                                             const uint32_t (&kept)[Tile::kKept][4], const T* query,
                                             const T* query_rest, const T* keys, int first_key) {
  const int quarter = threadIdx.x % kWarpSize / 8, r = threadIdx.x % 8;
  const int query_at = Tile::at((quarter & 1) * 8 + r, quarter >> 1);
  const uint32_t query_place = smem_address(query + query_at);
  const uint32_t rest_place = smem_address(query_rest + query_at);
  const uint32_t key_place = smem_address(keys + Tile::at(first_key + (quarter >> 1) * 8 + r, quarter & 1));
#pragma unroll
  for (int k = 0; k < Tile::kChunks; k += 2) {
    uint32_t a[4], rest[4];
    if constexpr (Tile::kKeepQuery) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = kept[k / 2][i];
    } else {
      ldmatrix_x4(a, Tile::further(query_place, k));
    }
    if constexpr (kRest) ldmatrix_x4(rest, Tile::further(rest_place, k));
#pragma unroll
    for (int n = 0; n < Tile::kKeyTiles; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, Tile::further(key_place, k) + n * Tile::kEightRows);
      if constexpr (kRest) {
        mma_m16n8k16<T>(scores[n], rest, b[0], b[1]);
        mma_m16n8k16<T>(scores[n + 1], rest, b[2], b[3]);
      }
      mma_m16n8k16<T>(scores[n], a, b[0], b[1]);
      mma_m16n8k16<T>(scores[n + 1], a, b[2], b[3]);
    }
  }
}

// out += weights times values [first_key, first_key + kWarpKeys) of the tile. The products of eight keys are added among
// themselves first, as in dot().
template <class Tile>
__device__ __forceinline__ void add_floats(float (&out)[Tile::kColumnTiles][4],
                                           const float (&weights)[Tile::kKeyTiles][4], const float* values,
                                           int first_key) {
  const int lane = threadIdx.x % kWarpSize, t = lane % 4;
  // Columns 8 n + 2 t lie in chunk 2 n + t / 2, which the swizzle moves to (2 n ^ 2 pair) + (t / 2 ^ odd) in row
  // 2 pair + odd.
  const float* rows[2] = {values + first_key * Tile::kRow + t / 2 * 4 + t % 2 * 2,
                          values + (first_key + 1) * Tile::kRow + (t / 2 ^ 1) * 4 + t % 2 * 2};
#pragma unroll
  for (int tile = 0; tile < Tile::kKeyTiles; ++tile) {
    float low[8], high[8];
#pragma unroll
    for (int key = 0; key < 8; ++key) {
      low[key] = shfl(weights[tile][key % 2], lane - t + key / 2);
      high[key] = shfl(weights[tile][2 + key % 2], lane - t + key / 2);
    }
#pragma unroll
    for (int n = 0; n < Tile::kColumnTiles; ++n) {
      float sum[4] = {};
#pragma unroll
      for (int key = 0; key < 8; ++key) {
        const int pair = key / 2;
        const Float2 value = *reinterpret_cast<const Float2*>(
            rows[key % 2] + (8 * tile + 2 * pair) * Tile::kRow + (2 * n ^ 2 * pair) * 4);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          sum[i] += low[key] * value.x[i];
          sum[2 + i] += high[key] * value.x[i];
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] += sum[i];
    }
  }
}

// The same for halves. kRest: add too what rounding takes from the weights.
template <class Tile, bool kRest, class T>
__device__ __forceinline__ void add_halves(float (&out)[Tile::kColumnTiles][4],
                                           const float (&weights)[Tile::kKeyTiles][4], const T* values,
                                           int first_key) {
  const int quarter = threadIdx.x % kWarpSize / 8, r = threadIdx.x % 8;
  const uint32_t place = smem_address(values + Tile::at(first_key + (quarter & 1) * 8 + r, quarter >> 1));
#pragma unroll
  for (int k = 0; k < Tile::kKeyTiles; k += 2) {
    uint32_t a[4], rest[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float low = weights[k + i / 2][i % 2 * 2], high = weights[k + i / 2][i % 2 * 2 + 1];
      a[i] = pack<T>(low, high);
      if constexpr (kRest)
        rest[i] = pack<T>(low - to_float(from_float<T>(low)), high - to_float(from_float<T>(high)));
    }
#pragma unroll
    for (int n = 0; n < Tile::kColumnTiles; n += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, Tile::further(place, n) + k * Tile::kEightRows);
      if constexpr (kRest) {
        mma_m16n8k16<T>(out[n], rest, b[0], b[1]);
        mma_m16n8k16<T>(out[n + 1], rest, b[2], b[3]);
      }
      mma_m16n8k16<T>(out[n], a, b[0], b[1]);
      mma_m16n8k16<T>(out[n + 1], a, b[2], b[3]);
    }
  }
}

// The running softmax of this thread's two rows. Maxima are of raw scores; the sum is of this thread's keys.
struct RunningSoftmax {
  float max[2], sum[2];

  // Scores to weights; returns in `keep` what earlier sums and values are to be multiplied with.
  template <int kKeyTiles>
  __device__ __forceinline__ void add(float (&scores)[kKeyTiles][4], float scale, float (&keep)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float best = max[h];
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) best = scores[n][2 * h + i] > best ? scores[n][2 * h + i] : best;
#pragma unroll
      for (int lanes = 1; lanes <= 2; lanes *= 2) {
        const float other = shfl_xor(best, lanes);
        best = other > best ? other : best;
      }
      const float shift = best == kNegInf ? 0.0f : best * scale;  // no -inf - -inf
      keep[h] = exp2_fast(max[h] * scale - shift);
      float tile_sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float weight = exp2_fast(scores[n][2 * h + i] * scale - shift);
          scores[n][2 * h + i] = weight;
          tile_sum += weight;
        }
      max[h] = best;
      sum[h] = sum[h] * keep[h] + tile_sum;
    }
  }
};

}  // namespace
}  // namespace esokern::cuda
