// The two ways to switch fibers.
#include "fiber.h"

#if defined(__x86_64__)
asm(R"(
.text
.globl stand_in_fiber_switch
.type stand_in_fiber_switch, @function
stand_in_fiber_switch:
  pushq %rbp
  pushq %rbx
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
  popq %rbx
  popq %rbp
  ret
.size stand_in_fiber_switch, . - stand_in_fiber_switch

.globl stand_in_fiber_begin
.type stand_in_fiber_begin, @function
stand_in_fiber_begin:
  movq %r12, %rdi
  callq *%rbx
  ud2
.size stand_in_fiber_begin, . - stand_in_fiber_begin
)");
#endif

namespace {

// makecontext passes integers only: a pointer travels as two halves.
void begin_portable(unsigned body_low, unsigned body_high, unsigned argument_low, unsigned argument_high) {
  const auto join = [](unsigned low, unsigned high) {
    return static_cast<uintptr_t>(low) | static_cast<uintptr_t>(static_cast<uint64_t>(high) << 32);
  };
  const FiberBody body = reinterpret_cast<FiberBody>(join(body_low, body_high));
  body(reinterpret_cast<void*>(join(argument_low, argument_high)));
}

}  // namespace

void fiber_start_portable(Fiber& fiber, void* stack, size_t stack_bytes, FiberBody body, void* argument) {
  if (!fiber.portable) fiber.portable = std::make_unique<ucontext_t>();
  ucontext_t& context = *fiber.portable;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = stack_bytes;
  context.uc_link = nullptr;
  const uint64_t body_bits = reinterpret_cast<uintptr_t>(body);
  const uint64_t argument_bits = reinterpret_cast<uintptr_t>(argument);
  makecontext(&context, reinterpret_cast<void (*)()>(&begin_portable), 4, static_cast<unsigned>(body_bits),
              static_cast<unsigned>(body_bits >> 32), static_cast<unsigned>(argument_bits),
              static_cast<unsigned>(argument_bits >> 32));
}

void fiber_switch_portable(Fiber& from, Fiber& to) {
  if (!from.portable) from.portable = std::make_unique<ucontext_t>();
  swapcontext(from.portable.get(), to.portable.get());
}
