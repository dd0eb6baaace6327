// Data races of kernels, found where AVATAR_HOSTCUDA_RACE is built: kernels are then compiled with
// ThreadSanitizer's instrumentation, whose calls end here instead of in its run time.
//
// Two accesses race if one of them writes, not both are atomic, and nothing orders them: neither a barrier of
// the block, nor a warp operation that both threads took part in. Nothing orders blocks of one launch.
#pragma once

#include <cstddef>

namespace hostcuda::race {

#if AVATAR_HOSTCUDA_RACE
void begin_launch();
void begin_block(size_t threads);
void block_barrier();
void warp_barrier(size_t first, unsigned mask);
// Memory that begins a new life.
void forget(const void* memory, size_t bytes);
void atomic(const void* address, size_t bytes, const void* code);
// Throws std::runtime_error if there was a race.
void end_launch(const char* name);
void abandon_launch();
#else
inline void begin_launch() {}
inline void begin_block(size_t) {}
inline void block_barrier() {}
inline void warp_barrier(size_t, unsigned) {}
inline void forget(const void*, size_t) {}
inline void atomic(const void*, size_t, const void*) {}
inline void end_launch(const char*) {}
inline void abandon_launch() {}
#endif

}  // namespace hostcuda::race
