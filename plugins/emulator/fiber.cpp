#include "fiber.h"

#include <sys/mman.h>

#include <vector>

namespace qe_emu {

namespace {

char* stack_of(int number) {
  static std::vector<char*> stacks;
  while (static_cast<int>(stacks.size()) <= number)
    stacks.push_back(static_cast<char*>(
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
  return stacks[static_cast<size_t>(number)];
}

}  // namespace

#if defined(__x86_64__)
void* scheduler_context = nullptr;
asm(R"(
.globl qe_emu_switch
qe_emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

void prepare(Context& context, int number, void (*main)()) {
  context.stack = stack_of(number);
  // Stacks that all began at the same offset would share the same few sets of the cache.
  void** sp = reinterpret_cast<void**>(context.stack + kStackBytes - 64 - number % 64 * 1088);
  *--sp = nullptr;  // keeps the stack 16-byte aligned at entry
  *--sp = reinterpret_cast<void*>(main);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  context.at = sp;
}
#else
ucontext_t scheduler_context;

void prepare(Context& context, int number, void (*main)()) {
  context.stack = stack_of(number);
  getcontext(&context.at);
  context.at.uc_stack.ss_sp = context.stack;
  context.at.uc_stack.ss_size = kStackBytes;
  context.at.uc_link = nullptr;
  makecontext(&context.at, main, 0);
}
#endif

}  // namespace qe_emu
