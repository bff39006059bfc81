// Fibers: each CUDA thread is a function with its own stack, which hands the processor on wherever it waits.
//
// On x86-64 the switch is written by hand: it saves what a called function must preserve, no more. Everywhere else, and
// where asked for, it is the C library's swapcontext, which also saves the signal mask and so costs a system call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include <ucontext.h>

struct Fiber {
  void* stack_pointer = nullptr;
  std::unique_ptr<ucontext_t> portable;  // large, so only where it is used
};

typedef void (*FiberBody)(void* argument);

#if defined(__x86_64__)
enum : bool { HAVE_NATIVE_FIBERS = true };

extern "C" {
// Saves the running fiber's registers on its stack, that stack's top in *from, and goes on with the one whose top is
// `to`.
void stand_in_fiber_switch(void** from, void* to);
// Where a fresh fiber begins: calls its body with its argument. See fiber_start for the registers.
void stand_in_fiber_begin();
}
#else
enum : bool { HAVE_NATIVE_FIBERS = false };
#endif

void fiber_start_portable(Fiber& fiber, void* stack, size_t stack_bytes, FiberBody body, void* argument);
void fiber_switch_portable(Fiber& from, Fiber& to);

// Prepares a fiber that begins with body(argument), which must not return.
inline void fiber_start(Fiber& fiber, void* stack, size_t stack_bytes, FiberBody body, void* argument, bool portable) {
#if defined(__x86_64__)
  if (!portable) {
    // What stand_in_fiber_switch pops, from the lowest address: r15, r14, r13, r12, rbx, rbp, the return address. The
    // body is called from a stack aligned to 16 bytes, as the calling convention demands.
    uintptr_t* top = reinterpret_cast<uintptr_t*>((reinterpret_cast<uintptr_t>(stack) + stack_bytes) & ~uintptr_t(63));
    top -= 9;
    top[0] = top[1] = top[2] = top[5] = top[8] = 0;
    top[3] = reinterpret_cast<uintptr_t>(argument);
    top[4] = reinterpret_cast<uintptr_t>(body);
    top[6] = reinterpret_cast<uintptr_t>(&stand_in_fiber_begin);
    top[7] = 0;
    fiber.stack_pointer = top;
    return;
  }
#endif
  (void)portable;
  fiber_start_portable(fiber, stack, stack_bytes, body, argument);
}

inline void fiber_switch(Fiber& from, Fiber& to, bool portable) {
#if defined(__x86_64__)
  if (!portable) {
    stand_in_fiber_switch(&from.stack_pointer, to.stack_pointer);
    return;
  }
#endif
  (void)portable;
  fiber_switch_portable(from, to);
}
