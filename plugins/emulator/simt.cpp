// The scheduler, and what threads ask of it. Compiled without -fsanitize=thread.
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "scheduler.h"

namespace qe_emu {

ThreadIndex now;
std::vector<Fiber> fibers;
std::vector<Block> running_blocks;

namespace {

std::vector<Message> flying;
int calm = 0;  // steps until messages land
int first_block_x = 0;
int favourite = 0, favours = 0;  // the block that runs, and how often more it does
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

void fiber_main() {
  body();
  running->state = State::kDone;
  leave(running->context);
  abort();  // a finished fiber is never entered again
}

// Any of those on their way. Who waits for the box that it fills can go on.
void land_message() {
  const size_t pick = random_number() % flying.size();
  const Message message = flying[pick];
  flying[pick] = flying.back();
  flying.pop_back();
  if (!shadow_land_message(message)) return;
  for (Fiber& f : fibers)
    if (f.state == State::kAtBox && f.rank == message.rank && f.box == message.box) make_ready(f);
}

// Messages stay on their way for some steps, or until nothing else can run.
void choose_calm() {
  const uint32_t steps = random_number() % 16;
  calm = steps < 8 ? 1 << steps : 1 << 30;
}

// One of them lands, or several, or all.
void land_messages() {
  const size_t most = random_number() % 2 ? flying.size() : random_number() % flying.size() + 1;
  for (size_t i = random_number() % 2 ? most : 1; i > 0; --i) land_message();
  choose_calm();
}

// The block that runs next, -1 if none can. One of a cluster keeps running for a while, between one step and thousands.
int choose_block() {
  const auto can_run = [](int rank) { return !running_blocks[static_cast<size_t>(rank)].ready.empty(); };
  const int count = static_cast<int>(running_blocks.size());
  if (count == 1) return can_run(0) ? 0 : -1;
  if (favours-- > 0 && can_run(favourite)) return favourite;
  const int start = static_cast<int>(random_number() % static_cast<uint32_t>(count));
  for (int i = 0; i < count; ++i)
    if (const int rank = (start + i) % count; can_run(rank)) {
      favours = 1 << random_number() % 12;
      return favourite = rank;
    }
  return -1;
}

void enter_block(int rank) {
  now.rank = rank;
  now.block_x = first_block_x + rank;
  shadow_enter_block(rank);
}

// Runs the blocks of one cluster. False after an error that leaves nothing to schedule.
bool run_cluster() {
  for (;;) {
    if (!flying.empty() && calm-- <= 0) land_messages();
    const int rank = choose_block();
    if (rank < 0) {
      if (flying.empty()) break;
      calm = 0;
      continue;
    }
    if (rank != now.rank) enter_block(rank);
    std::vector<int>& ready = running_blocks[static_cast<size_t>(rank)].ready;
    const size_t pick = random_number() % ready.size();
    Fiber& f = fibers[static_cast<size_t>(ready[pick])];
    running = &f;
    now.thread = f.thread;
    enter(f.context);
    running = nullptr;
    if (stopped) return false;
    if (f.state == State::kRunnable) continue;
    ready[pick] = ready.back();
    ready.pop_back();
    if (!settle(f)) return false;
  }
  for (const Fiber& f : fibers)
    if (f.state != State::kDone) return report_deadlock(), false;
  return true;
}

void start_cluster(const Shape& shape, int first) {
  const size_t threads = static_cast<size_t>(shape.cluster) * static_cast<size_t>(shape.threads);
  first_block_x = first % shape.grid_x;
  now = {0, shape.threads, first_block_x, first / shape.grid_x, shape.grid_x, 0};
  shadow_start_cluster(shape.cluster, shape.threads);
  enter_block(0);
  fibers.assign(threads, Fiber{});
  running_blocks.assign(static_cast<size_t>(shape.cluster), Block{});
  start_meetings();
  flying.clear();
  favours = 0;
  for (size_t i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    f.who = static_cast<int>(i);
    f.thread = f.who % shape.threads;
    f.rank = f.who / shape.threads;
    prepare(f.context, f.who, fiber_main);
    make_ready(f);
  }
}

// Why the emulator cannot launch this, or null.
const char* refuse(const Shape& shape) {
  if (shape.threads < 32 || shape.threads > 1024 || shape.threads % 32) return "launch: a block has 1 to 32 whole warps";
  if (shape.shared_bytes > kSharedBytes) return "launch: more shared memory than any chip has";
  if (shape.cluster < 1 || shape.cluster > kMostClusterBlocks) return "launch: a cluster has 1 to 8 blocks";
  if (shape.grid_x % shape.cluster) return "launch: the grid is no multiple of the cluster";
  return nullptr;
}

}  // namespace

void on_access(const void* p, size_t bytes, bool write, size_t alignment) {
  if (!running || on_stack(running->context, p)) return;
  if (reinterpret_cast<uintptr_t>(p) % alignment) report("misaligned access");
  const size_t at = static_cast<size_t>(static_cast<const unsigned char*>(p) - shared_memory);
  const bool harmless =
      in_shared(p) ? shadow_shared(at, bytes, write, running->who) : shadow_global(p, bytes, write);
  if (!harmless) {
    stopped = true;
    leave(running->context);  // and never comes back
  }
  if (preempt && random_number() % static_cast<uint32_t>(preempt) == 0) leave(running->context);
}

namespace {

constexpr int kMostLooks = 1 << 16;

void stop() {
  stopped = true;
  leave(running->context);  // and never comes back
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
  if (preempt && random_number() % static_cast<uint32_t>(preempt) == 0) leave(running->context);
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
  leave(running->context);
}

void collective(Collective kind, const void* in, void* out, const void* site) {
  running->state = State::kInCollective;
  running->kind = kind;
  running->in = in;
  running->out = out;
  running->site = site;
  leave(running->context);
}

void copy_async(void* to, const void* from) {
  if (shadow_issue_copy({to, from}, running->who)) running->open_group.push_back({to, from});
}

void copy_commit() {
  running->groups.push_back(std::move(running->open_group));
  running->open_group.clear();
}

// A copy lands when its thread waits for it and not before: the latest moment that the hardware allows.
void copy_wait(int pending) {
  while (static_cast<int>(running->groups.size()) > pending) {
    for (const PendingCopy& c : running->groups.front()) shadow_land_copy(c, running->who);
    running->groups.erase(running->groups.begin());
  }
}

void open_box(uint64_t* box, int bytes) {
  if (!shadow_open_box(box, bytes, running->who)) stop();
}

void boxes_are_open() { shadow_fence_boxes(running->who); }

// It lands when the scheduler chooses.
void send(float* own, uint64_t* box, int rank, const float* values, int count) {
  Message message{rank, 0, 0, sizeof(float) * static_cast<size_t>(count), {}};
  memcpy(message.data, values, message.bytes);
  if (!shadow_send(message, own, box, running->who)) stop();
  if (flying.empty()) choose_calm();
  flying.push_back(message);
  if (preempt && random_number() % static_cast<uint32_t>(preempt) == 0) leave(running->context);
}

void wait_for_box(const uint64_t* box) {
  const int number = shadow_find_box(box, running->who);
  if (number < 0) stop();
  if (!shadow_box_is_full(number)) {
    running->state = State::kAtBox;
    running->box = number;
    leave(running->context);
  }
  shadow_has_waited(number, running->who);
}

std::set<std::string> launch(const Shape& shape, uint64_t seed, int preempt_every, const std::function<void()>& kernel) {
  shadow_start_launch(shape.shared_bytes);
  if (const char* why = refuse(shape)) return report(why), reports();
  random_state = seed * 0x9E3779B97F4A7C15ull + 1;
  preempt = preempt_every;
  body = kernel;
  stopped = false;
  const size_t clusters = static_cast<size_t>(shape.grid_x / shape.cluster) * static_cast<size_t>(shape.grid_y);
  std::vector<int> order(clusters);
  for (size_t i = 0; i < clusters; ++i) order[i] = static_cast<int>(i) * shape.cluster;
  for (size_t i = clusters; i > 1; --i) std::swap(order[i - 1], order[random_number() % i]);
  for (int first : order) {
    start_cluster(shape, first);
    if (!run_cluster()) break;
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
