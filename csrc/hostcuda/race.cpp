#include "race.h"

#if AVATAR_HOSTCUDA_RACE

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "block.h"
#include "fiber.h"

namespace hostcuda::race {
namespace {

struct Access {
  uint32_t block = 0;  // counted from 1; 0 is no access
  uint32_t interval = 0;
  uint32_t clock = 0;
  uint16_t thread = 0;
  bool is_atomic = false;
  const void* code = nullptr;
};

// Of one byte: its last write, and the last reads by two different threads.
struct Shadow {
  Access write, reads[2];
};

constexpr size_t kGranule = 8;
using Clocks = std::array<uint32_t, kWarpSize>;

// Barriers of the block divide time into intervals; within one, every thread knows the clocks of its warp.
struct State {
  bool active = false;
  uint32_t block = 0, interval = 0;
  std::vector<Clocks> clocks;
  std::unordered_map<uintptr_t, std::array<Shadow, kGranule>> shadow;
  std::string report;
};

State state;

size_t current_thread() {
  return threadIdx.x + size_t{blockDim.x} * (threadIdx.y + size_t{blockDim.y} * threadIdx.z);
}

bool ordered(const Access& before, const Access& now) {
  if (!before.block) return true;
  if (before.block != now.block) return false;
  if (before.thread == now.thread || before.interval < now.interval) return true;
  return before.thread / kWarpSize == now.thread / kWarpSize &&
         state.clocks[now.thread][before.thread % kWarpSize] >= before.clock;
}

// As addr2line tells it, where that is installed.
std::string source_line(const void* code) {
  Dl_info info{};
  if (!dladdr(code, &info)) return "?";
  // A return address: the call is the instruction before.
  const auto offset = static_cast<const char*>(code) - static_cast<char*>(info.dli_fbase) - 1;
  char place[64], line[512] = {};
  std::snprintf(place, sizeof place, "0x%zx", static_cast<size_t>(offset));
  const std::string command = std::string("addr2line -e '") + info.dli_fname + "' " + place + " 2>/dev/null";
  if (FILE* pipe = popen(command.c_str(), "r")) {
    if (std::fgets(line, sizeof line, pipe)) line[std::strcspn(line, "\n")] = 0;
    pclose(pipe);
  }
  return *line ? line : info.dli_fname + std::string("+") + place;
}

std::string describe(const Access& access, bool writes) {
  return std::string(writes ? "write" : "read") + " at " + source_line(access.code) + " by thread " +
         std::to_string(access.thread) + " of the block that ran as number " + std::to_string(access.block);
}

void check(const Access& before, bool before_writes, const Access& now, bool now_writes) {
  if (ordered(before, now) || (before.is_atomic && now.is_atomic) || !state.report.empty()) return;
  state.report = "data race: " + describe(before, before_writes) + " and " + describe(now, now_writes);
}

void access(const void* address, size_t bytes, bool writes, bool is_atomic, const void* code) {
  if (!state.active || Fiber::on_stack(address)) return;
  const size_t thread = current_thread();
  const Access now{state.block,
                   state.interval,
                   state.clocks[thread][thread % kWarpSize],
                   static_cast<uint16_t>(thread),
                   is_atomic,
                   code};
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  std::array<Shadow, kGranule>* granule = nullptr;
  for (uintptr_t byte = begin; byte < begin + bytes; ++byte) {
    if (!granule || byte % kGranule == 0) granule = &state.shadow[byte / kGranule];
    Shadow& shadow = (*granule)[byte % kGranule];
    check(shadow.write, true, now, writes);
    if (writes) {
      for (const Access& read : shadow.reads) check(read, false, now, true);
      shadow = {now, {}};
    } else {
      if (shadow.reads[0].thread != now.thread || shadow.reads[0].block != now.block) {
        shadow.reads[1] = shadow.reads[0];
      }
      shadow.reads[0] = now;
    }
  }
}

}  // namespace

void begin_launch() {
  state.shadow.clear();
  state.report.clear();
  state.block = 0;
  state.active = true;
}

void begin_block(size_t threads) {
  ++state.block;
  state.interval = 0;
  state.clocks.assign(threads, Clocks{});
  for (size_t thread = 0; thread < threads; ++thread) state.clocks[thread][thread % kWarpSize] = 1;
}

void block_barrier() {
  ++state.interval;
}

void warp_barrier(size_t first, unsigned mask) {
  Clocks joined{};
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const Clocks& known = state.clocks[first + lane];
    for (int other = 0; other < kWarpSize; ++other) joined[other] = std::max(joined[other], known[other]);
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    state.clocks[first + lane] = joined;
    ++state.clocks[first + lane][lane];
  }
}

void forget(const void* memory, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  for (uintptr_t byte = begin; byte < begin + bytes; byte += kGranule) state.shadow.erase(byte / kGranule);
  if (bytes) state.shadow.erase((begin + bytes - 1) / kGranule);
}

void atomic(const void* address, size_t bytes, const void* code) {
  access(address, bytes, true, true, code);
}

void end_launch(const char* name) {
  state.active = false;
  state.shadow.clear();
  if (!state.report.empty()) throw std::runtime_error("hostcuda: " + std::string(name) + ": " + state.report);
}

void abandon_launch() {
  state.active = false;
  state.shadow.clear();
}

}  // namespace hostcuda::race

#define AVATAR_EXPORTED extern "C" __attribute__((visibility("default")))
#define AVATAR_ACCESS(size)                                                           \
  AVATAR_EXPORTED void __tsan_read##size(void* address) {                             \
    hostcuda::race::access(address, size, false, false, __builtin_return_address(0)); \
  }                                                                                   \
  AVATAR_EXPORTED void __tsan_write##size(void* address) {                            \
    hostcuda::race::access(address, size, true, false, __builtin_return_address(0));  \
  }                                                                                   \
  AVATAR_EXPORTED void __tsan_unaligned_read##size(void* address) {                   \
    hostcuda::race::access(address, size, false, false, __builtin_return_address(0)); \
  }                                                                                   \
  AVATAR_EXPORTED void __tsan_unaligned_write##size(void* address) {                  \
    hostcuda::race::access(address, size, true, false, __builtin_return_address(0));  \
  }
AVATAR_ACCESS(1)
AVATAR_ACCESS(2)
AVATAR_ACCESS(4)
AVATAR_ACCESS(8)
AVATAR_ACCESS(16)
AVATAR_EXPORTED void __tsan_read_range(void* address, size_t bytes) {
  hostcuda::race::access(address, bytes, false, false, __builtin_return_address(0));
}
AVATAR_EXPORTED void __tsan_write_range(void* address, size_t bytes) {
  hostcuda::race::access(address, bytes, true, false, __builtin_return_address(0));
}
AVATAR_EXPORTED void __tsan_init() {}
AVATAR_EXPORTED void __tsan_func_entry(void*) {}
AVATAR_EXPORTED void __tsan_func_exit() {}
AVATAR_EXPORTED void __tsan_vptr_update(void**, void*) {}
AVATAR_EXPORTED void __tsan_vptr_read(void**) {}

// Atomics of launchers, such as reference counts; kernels have their own (device_functions.h).
#define AVATAR_HOST_ATOMIC(bits)                                                                        \
  AVATAR_EXPORTED uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* a, int) {    \
    return __atomic_load_n(a, __ATOMIC_SEQ_CST);                                                        \
  }                                                                                                     \
  AVATAR_EXPORTED void __tsan_atomic##bits##_store(volatile uint##bits##_t* a, uint##bits##_t v, int) { \
    __atomic_store_n(a, v, __ATOMIC_SEQ_CST);                                                           \
  }                                                                                                     \
  AVATAR_EXPORTED uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile uint##bits##_t* a,            \
                                                                 uint##bits##_t v, int) {               \
    return __atomic_fetch_add(a, v, __ATOMIC_SEQ_CST);                                                  \
  }                                                                                                     \
  AVATAR_EXPORTED uint##bits##_t __tsan_atomic##bits##_fetch_sub(volatile uint##bits##_t* a,            \
                                                                 uint##bits##_t v, int) {               \
    return __atomic_fetch_sub(a, v, __ATOMIC_SEQ_CST);                                                  \
  }
AVATAR_HOST_ATOMIC(8)
AVATAR_HOST_ATOMIC(32)
AVATAR_HOST_ATOMIC(64)

#endif
