// A stack of its own for each running CUDA thread, and the switch between it and the scheduler's.
#pragma once

#include <cstddef>
#include <vector>

#if !defined(__x86_64__) || defined(AVATAR_HOSTCUDA_UCONTEXT)
#include <ucontext.h>
#undef AVATAR_HOSTCUDA_UCONTEXT
#define AVATAR_HOSTCUDA_UCONTEXT 1
#endif

namespace hostcuda {

class Fiber {
 public:
  // The next resume() calls entry(), on a stack of the pool.
  void prepare(void (*entry)());
  // From the scheduler: runs the fiber until it suspends.
  void resume();
  // From the fiber: back to the scheduler. What is finished is never resumed.
  void suspend(bool finished);
  // First thing on the fiber's stack.
  static void entered();
  // From the scheduler, once the fiber is finished or given up.
  void release();
  bool prepared() const { return stack_ != nullptr; }

  // Whether the address lies on the stack of some fiber.
  static bool on_stack(const void* address);

 private:
  char* stack_ = nullptr;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
#if AVATAR_HOSTCUDA_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
};

}  // namespace hostcuda
