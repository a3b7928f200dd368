// Fibers and their scheduler. Compiled without -fsanitize=thread.
#include "simt.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace qe_emu {

ThreadIndex now;

namespace {

constexpr size_t kStackBytes = 256 << 10;
enum class State { kRunnable, kAtBarrier, kInCollective, kDone };

struct Fiber {
#if defined(__x86_64__)
  void* context = nullptr;
#else
  ucontext_t context;
#endif
  char* stack = nullptr;
  State state = State::kRunnable;
  int thread = 0;
  Collective kind{};
  const void* in = nullptr;
  void* out = nullptr;
  const void* site = nullptr;
  bool waited = false;  // for the launch in front
  int looks = 0;        // at what other blocks write
  std::vector<std::vector<PendingCopy>> groups;
  std::vector<PendingCopy> open_group;
};

std::vector<Fiber> fibers;
Fiber* running = nullptr;
std::function<void()> body;
uint64_t random_state = 1;
int preempt = 0;
bool stopped = false;  // after an access that would harm the emulator itself

uint32_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<uint32_t>(random_state >> 20);
}

#if defined(__x86_64__)
void* scheduler_context = nullptr;
extern "C" void qe_emu_switch(void** from, void* to);
asm(R"(
.globl qe_emu_switch
qe_emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
void enter(Fiber& f) { qe_emu_switch(&scheduler_context, f.context); }
void leave(Fiber& f) { qe_emu_switch(&f.context, scheduler_context); }
#else
ucontext_t scheduler_context;
void enter(Fiber& f) { swapcontext(&scheduler_context, &f.context); }
void leave(Fiber& f) { swapcontext(&f.context, &scheduler_context); }
#endif

void fiber_main() {
  body();
  running->state = State::kDone;
  leave(*running);
  abort();  // a finished fiber is never entered again
}

void prepare_fiber(Fiber& f) {
#if defined(__x86_64__)
  // Stacks that all began at the same offset would share the same few sets of the cache.
  void** sp = reinterpret_cast<void**>(f.stack + kStackBytes - 64 - f.thread % 64 * 1088);
  *--sp = nullptr;  // keeps the stack 16-byte aligned at entry
  *--sp = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  f.context = sp;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack;
  f.context.uc_stack.ss_size = kStackBytes;
  f.context.uc_link = nullptr;
  makecontext(&f.context, fiber_main, 0);
#endif
}

char* stack_of(int thread) {
  static std::vector<char*> stacks;
  while (static_cast<int>(stacks.size()) <= thread)
    stacks.push_back(static_cast<char*>(
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
  return stacks[static_cast<size_t>(thread)];
}

// All 32 lanes wait: run the collective for them. False if they wait for different things.
bool finish_collective(int first) {
  const void* in[32];
  void* out[32];
  Fiber* warp = &fibers[static_cast<size_t>(first)];
  for (int l = 0; l < 32; ++l) {
    if (warp[l].kind != warp->kind || warp[l].site != warp->site) return false;
    in[l] = warp[l].in;
    out[l] = warp[l].out;
  }
  if (warp->kind == Collective::kLoadMatrix)
    for (int l = 0; l < 32; ++l) {
      const auto* row = *static_cast<const unsigned char* const*>(in[l]);
      if (!in_shared(row)) return report("ldmatrix: row outside shared memory"), false;
      if (reinterpret_cast<uintptr_t>(row) % 16) report("ldmatrix: misaligned row");
      shadow_shared(static_cast<size_t>(row - shared_memory), 16, false, warp[l].thread);
    }
  run_collective(warp->kind, in, out);
  return true;
}

// Runs one block. False after an error that leaves nothing to schedule.
bool run_block(int threads) {
  std::vector<int> ready(static_cast<size_t>(threads));
  for (int t = 0; t < threads; ++t) ready[static_cast<size_t>(t)] = t;
  std::vector<int> arrived(static_cast<size_t>(threads) / 32);  // lanes of each warp that wait for a collective
  for (;;) {
    while (!ready.empty()) {
      const size_t pick = random_number() % ready.size();
      const int t = ready[pick], warp = t / 32 * 32;
      Fiber& f = fibers[static_cast<size_t>(t)];
      running = &f;
      now.thread = t;
      enter(f);
      running = nullptr;
      if (stopped) return false;
      if (f.state != State::kRunnable) {
        ready[pick] = ready.back();
        ready.pop_back();
      }
      if (f.state != State::kInCollective) continue;
      int& lanes = arrived[static_cast<size_t>(warp) / 32];
      if (++lanes < 32) continue;
      lanes = 0;
      if (!finish_collective(warp)) return report("warp collective: lanes wait at different places"), false;
      for (int l = 0; l < 32; ++l) {
        fibers[static_cast<size_t>(warp + l)].state = State::kRunnable;
        ready.push_back(warp + l);
      }
    }
    int waiting = 0, done = 0;
    for (const Fiber& f : fibers) waiting += f.state == State::kAtBarrier, done += f.state == State::kDone;
    if (done == threads) return true;
    if (waiting + done != threads) return report("deadlock: a warp collective or barrier that not all threads reach"), false;
    if (done) report("barrier: some threads have already left the kernel");
    shadow_next_epoch();
    for (Fiber& f : fibers)
      if (f.state == State::kAtBarrier) {
        f.state = State::kRunnable;
        ready.push_back(f.thread);
      }
  }
}

bool on_stack(const void* p) {
  const char* c = static_cast<const char*>(p);
  return c >= running->stack && c < running->stack + kStackBytes;
}

}  // namespace

void on_access(const void* p, size_t bytes, bool write, size_t alignment) {
  if (!running || on_stack(p)) return;
  if (reinterpret_cast<uintptr_t>(p) % alignment) report("misaligned access");
  const size_t at = static_cast<size_t>(static_cast<const unsigned char*>(p) - shared_memory);
  const bool harmless =
      in_shared(p) ? shadow_shared(at, bytes, write, running->thread) : shadow_global(p, bytes, write);
  if (!harmless) {
    stopped = true;
    leave(*running);  // and never comes back
  }
  if (preempt && random_number() % static_cast<uint32_t>(preempt) == 0) leave(*running);
}

namespace {

constexpr int kMostLooks = 1 << 16;

void stop() {
  stopped = true;
  leave(*running);  // and never comes back
}

// A thread that looks that often waits for a block that has not run; a GPU may not run it either before this one ends.
void look() {
  if (++running->looks <= kMostLooks) return;
  report("deadlock: a block waits for another block");
  stop();
}

}  // namespace

void on_fresh_read(const void* p, size_t bytes) {
  look();
  if (!shadow_global(p, bytes, false, true)) stop();
  if (preempt && random_number() % static_cast<uint32_t>(preempt) == 0) leave(*running);
}

uint32_t count_up(uint32_t* counter, uint32_t last) {
  look();
  if (reinterpret_cast<uintptr_t>(counter) % 4) report("misaligned access");
  if (!shadow_global(counter, 4, true, true)) stop();
  shadow_count(counter);
  const uint32_t before = *counter;
  *counter = before >= last ? 0 : before + 1;
  return before;
}

void device_fence() { shadow_fence(); }
void prefetch(const void* p) { shadow_global(p, 1, false, true); }
void wait_for_previous() { running->waited = true; }
bool thread_has_waited() { return running->waited; }

void barrier(const void* site) {
  running->state = State::kAtBarrier;
  running->site = site;
  leave(*running);
}

void collective(Collective kind, const void* in, void* out, const void* site) {
  running->state = State::kInCollective;
  running->kind = kind;
  running->in = in;
  running->out = out;
  running->site = site;
  leave(*running);
}

void copy_async(void* to, const void* from) {
  if (shadow_issue_copy({to, from}, running->thread)) running->open_group.push_back({to, from});
}

void copy_commit() {
  running->groups.push_back(std::move(running->open_group));
  running->open_group.clear();
}

// A copy lands when its thread waits for it and not before: the latest moment that the hardware allows.
void copy_wait(int pending) {
  while (static_cast<int>(running->groups.size()) > pending) {
    for (const PendingCopy& c : running->groups.front()) shadow_land_copy(c, running->thread);
    running->groups.erase(running->groups.begin());
  }
}

std::set<std::string> launch(const Shape& shape, uint64_t seed, int preempt_every, const std::function<void()>& kernel) {
  shadow_start_launch(shape.shared_bytes);
  random_state = seed * 0x9E3779B97F4A7C15ull + 1;
  preempt = preempt_every;
  body = kernel;
  stopped = false;
  bool alive = true;
  const size_t blocks = static_cast<size_t>(shape.grid_x) * static_cast<size_t>(shape.grid_y);
  std::vector<int> order(blocks);
  for (size_t i = 0; i < blocks; ++i) order[i] = static_cast<int>(i);
  for (size_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[random_number() % i]);
  for (size_t i = 0; alive && i < blocks; ++i) {
      now = {0, shape.threads, order[i] % shape.grid_x, order[i] / shape.grid_x, shape.grid_x};
      shadow_start_block();
      fibers.assign(static_cast<size_t>(shape.threads), Fiber{});
      for (int t = 0; t < shape.threads; ++t) {
        Fiber& f = fibers[static_cast<size_t>(t)];
        f.thread = t;
        f.stack = stack_of(t);
        prepare_fiber(f);
      }
      alive = run_block(shape.threads);
    }
  return reports();
}

}  // namespace qe_emu

// The hooks of gcc's and clang's -fsanitize=thread.
#define QE_HOOK(n)                                                                             \
  void __tsan_read##n(void* p) { qe_emu::on_access(p, n, false, n); }                          \
  void __tsan_write##n(void* p) { qe_emu::on_access(p, n, true, n); }                          \
  void __tsan_unaligned_read##n(void* p) { qe_emu::on_access(p, n, false, 1); }                \
  void __tsan_unaligned_write##n(void* p) { qe_emu::on_access(p, n, true, 1); }
extern "C" {
QE_HOOK(1)
QE_HOOK(2)
QE_HOOK(4)
QE_HOOK(8)
QE_HOOK(16)
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_read_range(void* p, size_t n) { qe_emu::on_access(p, n, false, 1); }
void __tsan_write_range(void* p, size_t n) { qe_emu::on_access(p, n, true, 1); }
void __tsan_vptr_update(void**, void*) {}
}
