#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !AVATAR_HOSTCUDA_UCONTEXT
// Keeps what a function has to preserve on the old stack, stores its stack pointer in *from, and goes on
// where the stack `to` was left.
extern "C" void avatar_hostcuda_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.hidden avatar_hostcuda_switch
.globl avatar_hostcuda_switch
.type avatar_hostcuda_switch, @function
avatar_hostcuda_switch:
  pushq %rbx
  pushq %rbp
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbp
  popq %rbx
  ret
.size avatar_hostcuda_switch, .-avatar_hostcuda_switch
)");
#endif

namespace hostcuda {
namespace {

constexpr size_t kStackSize = 256 << 10, kGuard = 4096;
constexpr size_t kMaxStacks = 1024;  // the threads of the largest block

// Stacks lie in one region with an inaccessible page below each; pages are used when touched. The stack that
// was released last is handed out first, while it is in the cache.
class Stacks {
 public:
  char* acquire() {
    if (!region_) reserve();
    if (free_.empty()) throw std::bad_alloc();
    char* stack = free_.back();
    free_.pop_back();
    return stack;
  }
  void release(char* stack) { free_.push_back(stack); }
  bool contains(const void* address) const {
    return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(region_) <
           (region_ ? kMaxStacks * kStackSize : 0);
  }

 private:
  void reserve() {
    void* region = mmap(nullptr, kMaxStacks * kStackSize, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (region == MAP_FAILED) throw std::bad_alloc();
    region_ = static_cast<char*>(region);
    for (size_t i = kMaxStacks; i-- > 0;) {
      mprotect(region_ + i * kStackSize, kGuard, PROT_NONE);
      free_.push_back(region_ + i * kStackSize);
    }
  }

  char* region_ = nullptr;
  std::vector<char*> free_;
};

Stacks stacks;

// Where the scheduler waits. One block runs at a time.
#if AVATAR_HOSTCUDA_UCONTEXT
ucontext_t scheduler;
#else
void* scheduler = nullptr;
#endif

#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
#endif

}  // namespace

void Fiber::prepare(void (*entry)()) {
  stack_ = stacks.acquire();
  fake_stack_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(stack_ + kGuard, kStackSize - kGuard);
#endif
#if AVATAR_HOSTCUDA_UCONTEXT
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_ + kGuard;
  context_.uc_stack.ss_size = kStackSize - kGuard;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#else
  void** top = reinterpret_cast<void**>(stack_ + kStackSize);
  *--top = nullptr;  // a return address where backtraces end
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  stack_pointer_ = top;
#endif
}

void Fiber::resume() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, stack_ + kGuard, kStackSize - kGuard);
#endif
#if AVATAR_HOSTCUDA_UCONTEXT
  swapcontext(&scheduler, &context_);
#else
  avatar_hostcuda_switch(&scheduler, stack_pointer_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void Fiber::suspend([[maybe_unused]] bool finished) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(finished ? nullptr : &fake_stack_, scheduler_stack, scheduler_stack_size);
#endif
#if AVATAR_HOSTCUDA_UCONTEXT
  swapcontext(&context_, &scheduler);
#else
  avatar_hostcuda_switch(&stack_pointer_, scheduler);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, &scheduler_stack, &scheduler_stack_size);
#endif
}

void Fiber::entered() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
}

void Fiber::release() {
  if (stack_) stacks.release(stack_);
  stack_ = nullptr;
}

bool Fiber::on_stack(const void* address) {
  return stacks.contains(address);
}

}  // namespace hostcuda
