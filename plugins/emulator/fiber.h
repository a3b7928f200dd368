// Fibers: stacks of their own, and how to switch between one of them and the scheduler.
#pragma once
#include <stddef.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace qe_emu {

constexpr size_t kStackBytes = 256 << 10;

struct Context {
#if defined(__x86_64__)
  void* at = nullptr;
#else
  ucontext_t at;
#endif
  char* stack = nullptr;
};

// Makes `context` begin at `main`, which must not return, on the stack with this number.
void prepare(Context& context, int number, void (*main)());

#if defined(__x86_64__)
extern void* scheduler_context;
extern "C" void qe_emu_switch(void** from, void* to);
inline void enter(Context& context) { qe_emu_switch(&scheduler_context, context.at); }
inline void leave(Context& context) { qe_emu_switch(&context.at, scheduler_context); }
#else
extern ucontext_t scheduler_context;
inline void enter(Context& context) { swapcontext(&scheduler_context, &context.at); }
inline void leave(Context& context) { swapcontext(&context.at, &scheduler_context); }
#endif

inline bool on_stack(const Context& context, const void* p) {
  const char* c = static_cast<const char*>(p);
  return c >= context.stack && c < context.stack + kStackBytes;
}

}  // namespace qe_emu
