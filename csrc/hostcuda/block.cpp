#include "block.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"
#include "race.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace hostcuda {
namespace {

constexpr size_t kPlainLimit = 48 << 10;    // of shared memory, without a kernel's consent to more
constexpr size_t kDeviceLimit = 163 << 10;  // of sm_80, the least of those built for
constexpr size_t kRedzone = 64;
constexpr unsigned char kPoison = 0xff, kCanary = 0xa5;

enum class State { fresh, ready, at_barrier, in_warp_call, done };

struct Thread {
  Fiber fiber;
  State state;
  Site site;
  bool vote;
  Votes votes;
  // The warp operation it waits in, and what comes of it.
  unsigned mask;
  uint64_t value, result;
  int argument;
};

// Without AddressSanitizer, canaries around the bytes tell at the end of the block whether they were overrun.
struct SharedArray {
  static constexpr std::align_val_t kAlignment{32};
  struct Free {
    void operator()(unsigned char* memory) const { ::operator delete[](memory, kAlignment); }
  };

  const void* key;
  size_t bytes;
  std::unique_ptr<unsigned char[], Free> memory;  // aligned for matrices of warps

#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kMargin = 0;
#else
  static constexpr size_t kMargin = kRedzone;
#endif

  SharedArray(const void* key, size_t bytes)
      : key(key), bytes(bytes), memory(new (kAlignment) unsigned char[bytes + 2 * kMargin]) {
    std::memset(memory.get(), kCanary, bytes + 2 * kMargin);
    std::memset(data(), kPoison, bytes);
  }
  unsigned char* data() const { return memory.get() + kMargin; }
  bool intact() const {
    const auto is_canary = [](unsigned char byte) { return byte == kCanary; };
    return std::all_of(memory.get(), data(), is_canary) &&
           std::all_of(data() + bytes, data() + bytes + kMargin, is_canary);
  }
};

// Lanes of a warp that wait in one operation, while there is only one that they wait in.
struct WarpGroup {
  int waiting = 0;
  unsigned mask = 0;
  Site site;
};

struct Running {
  std::vector<Thread> threads;
  std::vector<WarpGroup> groups;            // of each warp
  size_t count = 0, done = 0, waiting = 0;  // threads; of them finished; of them at the block's barrier
  size_t current = 0;
  const std::function<void()>* body = nullptr;
  std::vector<SharedArray> shared;
  size_t shared_limit = 0;
  std::exception_ptr error;
  bool shuffled = false;
  std::mt19937_64 random;
};

Running running;

uint64_t seed_from_environment() {
  const char* text = std::getenv("AVATAR_HOSTCUDA_SEED");
  return text ? std::strtoull(text, nullptr, 10) : 0;
}

uint64_t seed = seed_from_environment();
std::mutex one_launch_at_a_time;
std::map<const void*, size_t> dynamic_limits;
std::map<const void*, size_t> launches;

Thread& current() {
  return running.threads[running.current];
}

std::string describe(Site site) {
  return std::string(site.file) + ":" + std::to_string(site.line);
}

std::string describe(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) +
         ")";
}

uint3 index_of(size_t rank) {
  const unsigned n = static_cast<unsigned>(rank);
  return {n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y};
}

std::string describe(size_t rank) {
  return "thread " + describe(index_of(rank)) + " of block " + describe(blockIdx);
}

std::string describe_first_done() {
  for (size_t rank = 0; rank < running.count; ++rank) {
    if (running.threads[rank].state == State::done) return describe(rank);
  }
  return "no thread";
}

void wait(State state) {
  Thread& thread = current();
  thread.state = state;
  thread.fiber.suspend(false);
}

void thread_main() {
  Fiber::entered();
  try {
    (*running.body)();
    for (size_t rank = 0; running.waiting && rank < running.count; ++rank) {
      const Thread& other = running.threads[rank];
      if (other.state == State::at_barrier) {
        fail("returned, but " + describe(rank) + " waits at the barrier " + describe(other.site));
      }
    }
  } catch (...) {
    if (!running.error) running.error = std::current_exception();
  }
  current().state = State::done;
  ++running.done;
  current().fiber.suspend(true);
  std::abort();
}

[[noreturn]] void report_deadlock() {
  std::string message = "hostcuda: no thread of block " + describe(blockIdx) + " can go on:";
  std::map<std::string, size_t> waiting;
  for (size_t rank = 0; rank < running.count; ++rank) {
    const Thread& thread = running.threads[rank];
    if (thread.state == State::done) continue;
    ++waiting[(thread.state == State::at_barrier ? " at the barrier " : " at the warp operation ") +
              describe(thread.site)];
  }
  for (const auto& [where, threads] : waiting) message += " " + std::to_string(threads) + where + ";";
  message += " " + std::to_string(running.done) + " have returned";
  throw std::runtime_error(message);
}

void run_threads(std::vector<size_t>& order) {
  while (running.done < running.count) {
    if (running.shuffled) std::shuffle(order.begin(), order.end(), running.random);
    bool moved = false;
    for (const size_t rank : order) {
      Thread& thread = running.threads[rank];
      if (thread.state != State::fresh && thread.state != State::ready) continue;
      if (thread.state == State::fresh) thread.fiber.prepare(thread_main);
      thread.state = State::ready;
      running.current = rank;
      threadIdx = index_of(rank);
      moved = true;
      thread.fiber.resume();
      if (thread.state == State::done) thread.fiber.release();
      if (running.error) std::rethrow_exception(running.error);
    }
    if (!moved) report_deadlock();
  }
}

void check_overruns() {
  for (const SharedArray& array : running.shared) {
    if (!array.intact()) {
      throw std::runtime_error("hostcuda: block " + describe(blockIdx) + " wrote past a shared array of " +
                               std::to_string(array.bytes) + " bytes");
    }
  }
}

void run_block(uint3 index, size_t shared, std::vector<size_t>& order) {
  blockIdx = index;
  running.random.seed(seed * 0x9e3779b97f4a7c15u + index.x + (uint64_t{index.y} << 32) +
                      (uint64_t{index.z} << 48));
  running.done = running.waiting = 0;
  running.error = nullptr;
  running.shared.clear();
  if (shared) shared_array(nullptr, shared, 1);
  for (size_t rank = 0; rank < running.count; ++rank) running.threads[rank].state = State::fresh;
  running.groups.assign(running.count / kWarpSize + 1, {});
  race::begin_block(running.count);
  run_threads(order);
  check_overruns();
}

void check_configuration(const char* name, dim3 grid, dim3 block, size_t shared, size_t shared_limit) {
  const auto refuse = [&](const std::string& what) {
    throw std::runtime_error(std::string(name) + ": invalid configuration argument: " + what);
  };
  const size_t threads = size_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > 1024 || block.z > 64)
    refuse("block of " + std::to_string(threads) + " threads");
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) refuse("grid too large");
  if (shared > shared_limit) refuse(std::to_string(shared) + " bytes of shared memory");
}

// For the symbol table to name.
size_t address_in_library(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info)) return 0;
  return static_cast<size_t>(static_cast<const char*>(kernel) - static_cast<char*>(info.dli_fbase));
}

// AVATAR_HOSTCUDA_LOG names a file that gets a line for each kernel that was launched: its address within the
// library.
void record_launch(const void* kernel) {
  if (launches[kernel]++) return;
  const char* path = std::getenv("AVATAR_HOSTCUDA_LOG");
  if (!path) return;
  if (FILE* log = std::fopen(path, "a")) {
    std::fprintf(log, "%zx\n", address_in_library(kernel));
    std::fclose(log);
  }
}

// AVATAR_HOSTCUDA_DRY_RUN names a file that gets a line for each launch instead of the launch itself: the
// kernel's address as above, grid, block and bytes of dynamic shared memory.
bool is_dry_run(const void* kernel, dim3 grid, dim3 block, size_t shared) {
  const char* path = std::getenv("AVATAR_HOSTCUDA_DRY_RUN");
  if (!path) return false;
  if (FILE* log = std::fopen(path, "a")) {
    std::fprintf(log, "%zx %u %u %u %u %u %u %zu\n", address_in_library(kernel), grid.x, grid.y, grid.z,
                 block.x, block.y, block.z, shared);
    std::fclose(log);
  }
  return true;
}

}  // namespace

Votes block_barrier(bool vote, Site site) {
  Thread& thread = current();
  if (running.done)
    fail("reached the barrier " + describe(site) + ", but " + describe_first_done() + " has returned");
  for (size_t rank = 0; running.waiting && rank < running.count; ++rank) {
    const Thread& other = running.threads[rank];
    if (other.state != State::at_barrier) continue;
    if (!(other.site == site)) {
      fail("reached the barrier " + describe(site) + ", but " + describe(rank) + " waits at the barrier " +
           describe(other.site));
    }
    break;
  }
  thread.site = site;
  thread.vote = vote;
  if (++running.waiting < running.count) {
    wait(State::at_barrier);
    return thread.votes;
  }
  running.waiting = 0;
  race::block_barrier();
  Votes votes{static_cast<int>(running.count), 0};
  for (size_t rank = 0; rank < running.count; ++rank) votes.nonzero += running.threads[rank].vote;
  for (size_t rank = 0; rank < running.count; ++rank) {
    running.threads[rank].votes = votes;
    running.threads[rank].state = State::ready;
  }
  return votes;
}

uint64_t warp_call(unsigned mask, uint64_t value, int argument, int width, Answer answer, Site site) {
  Thread& thread = current();
  const size_t first = running.current / kWarpSize * kWarpSize;
  const int own = static_cast<int>(running.current - first);
  const auto complain = [&](const std::string& what) {
    char text[16];
    std::snprintf(text, sizeof text, "0x%08x", mask);
    fail("is at the warp operation " + describe(site) + " with mask " + text + ", " + what);
  };
  if (!(mask >> own & 1)) complain("which leaves it out");
  thread.site = site;
  thread.mask = mask;
  thread.value = value;
  thread.argument = argument;
  WarpGroup& group = running.groups[running.current / kWarpSize];
  // What is checked below has been for the group that this lane joins, and is again for the last to join.
  if (running.done == 0 && group.waiting > 0 && group.mask == mask && group.site == site &&
      ++group.waiting < __builtin_popcount(mask)) {
    wait(State::in_warp_call);
    return thread.result;
  }
  WarpCall call;
  bool complete = true;
  int waiting = 1;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (first + lane >= running.count) complain("but the block has no lane " + std::to_string(lane));
    const Thread& other = running.threads[first + lane];
    if (other.state == State::done) complain("but " + describe(first + lane) + " has returned");
    if (lane == own) continue;
    const bool same = other.state == State::in_warp_call && other.mask == mask && other.site == site;
    complete &= same;
    waiting += same;
    // Lanes that wait for each other at different operations never go on.
    if (other.state == State::in_warp_call && !same && (other.mask >> own & 1)) {
      complain("but " + describe(first + lane) + " waits at " + describe(other.site) +
               " or with another mask");
    }
  }
  if (!complete) {
    if (group.waiting == 0) group = {waiting, mask, site};
    wait(State::in_warp_call);
    return thread.result;
  }
  if (group.mask == mask && group.site == site) group.waiting = 0;
  race::warp_barrier(first, mask);
  call.mask = mask;
  call.width = width;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    call.values[lane] = running.threads[first + lane].value;
    call.arguments[lane] = running.threads[first + lane].argument;
  }
  const uint64_t result = answer.same_for_all ? answer.of(call, own) : 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    running.threads[first + lane].result = answer.same_for_all ? result : answer.of(call, lane);
    running.threads[first + lane].state = State::ready;
  }
  return thread.result;
}

void* shared_array(const void* key, size_t bytes, size_t alignment) {
  if (alignment > 16) fail("shared arrays are aligned to 16 bytes at most");
  size_t used = bytes;
  for (const SharedArray& array : running.shared) {
    if (array.key == key) return array.data();
    used += array.bytes;
  }
  if (used > running.shared_limit) fail("wants " + std::to_string(used) + " bytes of shared memory");
  running.shared.emplace_back(key, bytes);
  race::forget(running.shared.back().data(), bytes);
  return running.shared.back().data();
}

void* dynamic_shared() {
  if (running.shared.empty() || running.shared.front().key)
    fail("uses dynamic shared memory, launched with none");
  return running.shared.front().data();
}

void interleave() {
  if (running.shuffled && running.random() % 4 == 0) wait(State::ready);
}

void fail(const std::string& message) {
  throw std::runtime_error("hostcuda: " + describe(running.current) + " " + message);
}

void launch(const void* kernel, const char* name, dim3 grid, dim3 block, size_t shared,
            const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  const auto limit = dynamic_limits.find(kernel);
  const bool consents = limit != dynamic_limits.end();
  running.shared_limit = consents ? kDeviceLimit : kPlainLimit;
  check_configuration(name, grid, block, shared,
                      consents ? std::max(kPlainLimit, limit->second) : kPlainLimit);
  record_launch(kernel);
  if (is_dry_run(kernel, grid, block, shared)) return;
  blockDim = block;
  gridDim = grid;
  running.body = &body;
  running.shuffled = seed != 0;
  running.count = size_t{block.x} * block.y * block.z;
  if (running.threads.size() < running.count) running.threads.resize(running.count);
  std::vector<size_t> order(running.count);
  for (size_t rank = 0; rank < running.count; ++rank) order[rank] = rank;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> block_order(blocks);
  for (uint64_t n = 0; n < blocks; ++n) block_order[n] = n;
  if (running.shuffled) std::shuffle(block_order.begin(), block_order.end(), std::mt19937_64(seed));
  race::begin_launch();
  try {
    for (const uint64_t n : block_order) {
      run_block({static_cast<unsigned>(n % grid.x), static_cast<unsigned>(n / grid.x % grid.y),
                 static_cast<unsigned>(n / grid.x / grid.y)},
                shared, order);
    }
    race::end_launch(name);
  } catch (...) {
    race::abandon_launch();
    for (Thread& thread : running.threads) thread.fiber.release();
    running.error = nullptr;
    throw;
  }
}

void allow_dynamic_shared(const void* kernel, size_t bytes) {
  if (bytes > kDeviceLimit) throw std::runtime_error("hostcuda: sm_80 has less shared memory than asked for");
  dynamic_limits[kernel] = bytes;
}

}  // namespace hostcuda

extern "C" __attribute__((visibility("default"))) void avatar_hostcuda_set_seed(uint64_t value) {
  hostcuda::seed = value;
}
