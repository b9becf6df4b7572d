// Collectives of a warp: every lane leaves its part, the last one to arrive does the work for all.
#include <algorithm>
#include <cstring>
#include <map>

#include "machine.h"
#include "numbers.h"

namespace esokern::emulator {
namespace {

constexpr const char* kNames[] = {"shfl", "ballot", "warp_sync", "ldmatrix", "ldmatrix_trans", "mma", "mma"};
const char* name_of(Op op) {
  return kNames[static_cast<int>(op)];
}

std::map<Site, int64_t> conflicts;  // of ldmatrix, by call site

void shuffle_lanes(Warp& warp) {
  uint64_t before[kWarp];
  for (int i = 0; i < kWarp; ++i) before[i] = warp.lane[i].value;
  for (int i = 0; i < kWarp; ++i) {
    const unsigned source = warp.lane[i].source;
    warp.lane[i].value =
        warp.arrived >> source & 1 ? before[source] : ~uint64_t{0};  // an exited lane gives poison
  }
}

void ballot_lanes(Warp& warp) {
  uint64_t votes = 0;
  for (int i = 0; i < kWarp; ++i)
    votes |= static_cast<uint64_t>((warp.arrived >> i & 1) && warp.lane[i].value) << i;
  for (int i = 0; i < kWarp; ++i) warp.lane[i].value = votes;
}

// Eight rows of 16 bytes pass at once if they lie in different sixteenths of 128 bytes, or are the same row.
void count_bank_conflicts(const Warp& warp, int matrix) {
  int passes = 1;
  for (int bank = 0; bank < 8; ++bank) {
    uint32_t rows[8];
    int count = 0;
    for (int i = 0; i < 8; ++i) {
      const uint32_t address = warp.lane[matrix * 8 + i].a[0];
      if (address / 16 % 8 == static_cast<uint32_t>(bank) &&
          std::find(rows, rows + count, address) == rows + count)
        rows[count++] = address;
    }
    passes = std::max(passes, count);
  }
  if (passes > 1) conflicts[warp.site] += passes - 1;
}

void ldmatrix_lanes(Warp& warp, int first_thread, bool transposed) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t element[8][8];
    for (int row = 0; row < 8; ++row) {
      const uint32_t address = warp.lane[matrix * 8 + row].a[0];
      if (checker != nullptr)
        checker->access(first_thread + matrix * 8 + row, segment + address, 16, Checker::kRead, warp.site);
      memcpy(element[row], segment + address, 16);
    }
    count_bank_conflicts(warp, matrix);
    for (int i = 0; i < kWarp; ++i) {
      const int g = i / 4, t = i % 4;
      const uint32_t low = transposed ? element[2 * t][g] : element[g][2 * t];
      const uint32_t high = transposed ? element[2 * t + 1][g] : element[g][2 * t + 1];
      warp.lane[i].r[matrix] = low | high << 16;
    }
  }
}

template <float (*widen)(uint16_t)>
void mma_lanes(Warp& warp) {
  float a[16][16], b[16][8], d[16][8];
  for (int i = 0; i < kWarp; ++i) {
    const Lane& lane = warp.lane[i];
    const int g = i / 4, t = i % 4;
    for (int h = 0; h < 2; ++h) {
      const auto half = [h](uint32_t word) { return widen(static_cast<uint16_t>(word >> 16 * h)); };
      a[g][2 * t + h] = half(lane.a[0]);
      a[g + 8][2 * t + h] = half(lane.a[1]);
      a[g][2 * t + 8 + h] = half(lane.a[2]);
      a[g + 8][2 * t + 8 + h] = half(lane.a[3]);
      b[2 * t + h][g] = half(lane.b[0]);
      b[2 * t + 8 + h][g] = half(lane.b[1]);
      d[g][2 * t + h] = lane.d[h];
      d[g + 8][2 * t + h] = lane.d[2 + h];
    }
  }
  for (int row = 0; row < 16; ++row) {  // products and their sum are exact, then rounded once
    double sum[8];
    for (int column = 0; column < 8; ++column) sum[column] = d[row][column];
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) sum[column] += static_cast<double>(a[row][k]) * b[k][column];
    for (int column = 0; column < 8; ++column) d[row][column] = static_cast<float>(sum[column]);
  }
  for (int i = 0; i < kWarp; ++i)
    for (int h = 0; h < 2; ++h) {
      warp.lane[i].d[h] = d[i / 4][i % 4 * 2 + h];
      warp.lane[i].d[2 + h] = d[i / 4 + 8][i % 4 * 2 + h];
    }
}

void finish_collective(int w) {
  Warp& warp = machine.warp[w];
  if (warp.op >= Op::ldmatrix && warp.arrived != ~0u)
    fail(warp.site,
         std::string(name_of(warp.op)) + " needs all 32 lanes, but some have exited or never were");
  switch (warp.op) {
    case Op::shuffle:
      shuffle_lanes(warp);
      break;
    case Op::ballot:
      ballot_lanes(warp);
      break;
    case Op::warp_sync:
      if (checker != nullptr) checker->warp_barrier(w, warp.arrived);
      break;
    case Op::ldmatrix:
      ldmatrix_lanes(warp, w * kWarp, false);
      break;
    case Op::ldmatrix_trans:
      ldmatrix_lanes(warp, w * kWarp, true);
      break;
    case Op::mma_bf16:
      mma_lanes<widen_bf16>(warp);
      break;
    case Op::mma_f16:
      mma_lanes<widen_f16>(warp);
      break;
  }
  const uint32_t lanes = warp.arrived;
  warp.arrived = 0;
  wake_warp(w, lanes);
}

Lane& my_lane() {
  return machine.warp[current() / kWarp].lane[current() % kWarp];
}

// The running lane has left its part in my_lane(); afterwards its result is there.
void meet(Op op, Site site) {
  step(site);
  const int w = current() / kWarp;
  Warp& warp = machine.warp[w];
  if (warp.arrived == 0) {
    warp.op = op;
    warp.site = site;
  } else if (warp.op != op || warp.site != site) {
    fail(site, std::string(name_of(op)) + " in a divergent branch: other lanes of the warp wait for " +
                   name_of(warp.op) + " at " + describe(warp.site));
  }
  warp.arrived |= 1u << current() % kWarp;
  if (warp.arrived == warp.alive) return finish_collective(w);
  wait_for(name_of(op), site);
}

}  // namespace

void finish_collective_if_complete(int w) {
  const Warp& warp = machine.warp[w];
  if (warp.arrived != 0 && warp.arrived == warp.alive) finish_collective(w);
}

void warp_sync(Site site) {
  meet(Op::warp_sync, site);
}

uint64_t shuffle(uint64_t value, unsigned source_lane, Site site) {
  Lane& lane = my_lane();
  lane.value = value;
  lane.source = source_lane;
  meet(Op::shuffle, site);
  return lane.value;
}

uint32_t ballot(bool predicate, Site site) {
  Lane& lane = my_lane();
  lane.value = predicate;
  meet(Op::ballot, site);
  return static_cast<uint32_t>(lane.value);
}

void ldmatrix(uint32_t* r, uint32_t row, bool transposed, Site site) {
  check_shared(row, 16, site);
  Lane& lane = my_lane();
  lane.a[0] = row;
  lane.r = r;
  meet(transposed ? Op::ldmatrix_trans : Op::ldmatrix, site);
}

void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool is_bf16, Site site) {
  Lane& lane = my_lane();
  memcpy(lane.a, a, sizeof(lane.a));
  lane.b[0] = b0;
  lane.b[1] = b1;
  lane.d = d;
  meet(is_bf16 ? Op::mma_bf16 : Op::mma_f16, site);
}

int64_t bank_conflicts() {
  int64_t sum = 0;
  for (const auto& [site, count] : conflicts) sum += count;
  return sum;
}

std::string bank_conflict_sites() {
  std::vector<std::pair<int64_t, Site>> worst;
  for (const auto& [site, count] : conflicts) worst.emplace_back(count, site);
  std::sort(worst.rbegin(), worst.rend());
  std::string text;
  for (const auto& [count, site] : worst) text += describe(site) + ": " + std::to_string(count) + "\n";
  return text;
}

void reset_bank_conflicts() {
  conflicts.clear();
}

}  // namespace esokern::emulator
