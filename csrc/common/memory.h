// Memory that ops work in and give results in, which one call leaves to the next: memory fresh from the
// system costs a page fault for each 4 KiB, for large parts as long as what is computed in them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace avatar {

// Uninitialised, 64-byte aligned memory of at least `bytes` bytes.
void* take_memory(size_t bytes);
// Of as many bytes as were taken. Up to 128 MiB in all are kept for others to take.
void give_memory(void* memory, size_t bytes) noexcept;
// Hands all that is kept back to the system.
void release_memory();

// Asks the system to back what is fresh by huge pages.
void advise_huge_pages(void* memory, size_t bytes);

struct GiveMemory {
  size_t bytes = 0;
  void operator()(void* memory) const noexcept { give_memory(memory, bytes); }
};

template <typename T>
using Buffer = std::unique_ptr<T[], GiveMemory>;

// Uninitialised, so that its pages are touched first by whoever fills it.
template <typename T>
Buffer<T> buffer(int64_t count) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(T);
  return Buffer<T>(static_cast<T*>(take_memory(bytes)), GiveMemory{bytes});
}

}  // namespace avatar
