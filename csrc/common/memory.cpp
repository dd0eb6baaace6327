#include "common/memory.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace avatar {
namespace {

constexpr size_t kHugePage = size_t{1} << 21;
// Smaller blocks are malloc's, which keeps them at hand itself.
constexpr size_t kLeastKept = size_t{1} << 16;
#if defined(AVATAR_SANITIZE)
// Every block its own, so that sanitizers see where it ends.
constexpr size_t kMostKept = 0;
#else
constexpr size_t kMostKept = size_t{128} << 20;
#endif

struct Kept {
  std::mutex mutex;
  std::unordered_map<size_t, std::vector<void*>> blocks;
  size_t bytes = 0;
};

// Never destroyed: threads may give memory back until the very end.
Kept& kept() {
  static Kept* const all = [] {
    static Kept* const made = new Kept;
#if defined(__linux__)
    // A process forked meanwhile is to find the lock open.
    pthread_atfork([] { made->mutex.lock(); }, [] { made->mutex.unlock(); }, [] { made->mutex.unlock(); });
#endif
    return made;
  }();
  return *all;
}

// Sizes in steps of an eighth to a quarter, so that calls of about one size share blocks.
size_t block_size(size_t bytes) {
  size_t step = 64;
  while (kMostKept > 0 && 8 * step <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

void* allocate(size_t size) {
  const size_t alignment = size >= kHugePage ? kHugePage : 64;
  void* memory = std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
  if (!memory) throw std::bad_alloc();
  advise_huge_pages(memory, size);
  return memory;
}

}  // namespace

void advise_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  const size_t begin = reinterpret_cast<size_t>(memory);
  const size_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const size_t last = (begin + bytes) / kHugePage * kHugePage;
  // Advice that is not taken does no harm.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

void* take_memory(size_t bytes) {
  const size_t size = block_size(bytes > 0 ? bytes : 1);
  if (size >= kLeastKept && kMostKept > 0) {
    Kept& all = kept();
    const std::lock_guard<std::mutex> lock(all.mutex);
    std::vector<void*>& blocks = all.blocks[size];
    if (!blocks.empty()) {
      void* memory = blocks.back();
      blocks.pop_back();
      all.bytes -= size;
      return memory;
    }
  }
  return allocate(size);
}

void give_memory(void* memory, size_t bytes) noexcept {
  const size_t size = block_size(bytes > 0 ? bytes : 1);
  if (size >= kLeastKept && size <= kMostKept) {
    Kept& all = kept();
    const std::lock_guard<std::mutex> lock(all.mutex);
    if (all.bytes + size <= kMostKept) {
      try {
        all.blocks[size].push_back(memory);
        all.bytes += size;
        return;
      } catch (const std::bad_alloc&) {
      }
    }
  }
  std::free(memory);
}

void release_memory() {
  Kept& all = kept();
  const std::lock_guard<std::mutex> lock(all.mutex);
  for (auto& [size, blocks] : all.blocks) {
    for (void* memory : blocks) std::free(memory);
    blocks.clear();
  }
  all.bytes = 0;
}

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CompositeExplicitAutograd, m) {
  m.impl("release_memory", TORCH_BOX(&release_memory));
}

}  // namespace avatar
