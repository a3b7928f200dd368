// The scheduler, and what it does where threads meet. Compiled without -fsanitize=thread.
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "fiber.h"
#include "simt.h"

namespace qe_emu {

ThreadIndex now;

namespace {

enum class State { kRunnable, kAtBarrier, kInCollective, kAtClusterBarrier, kDone };

struct Fiber {
  Context context;
  State state = State::kRunnable;
  int who = 0, thread = 0, rank = 0;  // in the cluster, in its block; and its block in the cluster
  Collective kind{};
  const void* in = nullptr;
  void* out = nullptr;
  const void* site = nullptr;
  bool waited = false;  // for the launch in front
  int looks = 0;        // at what other blocks write
  std::vector<std::vector<PendingCopy>> groups;
  std::vector<PendingCopy> open_group;
};

struct Block {
  std::vector<int> ready;  // threads of the cluster
  int waiting = 0, done = 0;
};

std::vector<Fiber> fibers;        // of the cluster that runs
std::vector<Block> blocks;        // of it
std::vector<int> in_collective;   // lanes of each warp that wait for one
std::vector<int> parked;          // first threads of the warps that wait for a round of the cluster's barrier
size_t arrived_threads = 0;       // in the round that is not complete
int complete_rounds = 0;
int first_block_x = 0;
int favourite = 0, favours = 0;   // the block that runs, and how often more it does
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

void make_ready(Fiber& f) {
  f.state = State::kRunnable;
  blocks[static_cast<size_t>(f.rank)].ready.push_back(f.who);
}

void make_ready_warp(int first) {
  for (int l = 0; l < 32; ++l) make_ready(fibers[static_cast<size_t>(first + l)]);
}

// The last arrival of a round lets everybody go who waits for it.
bool cluster_arrive(int first) {
  Rounds& warp = rounds[static_cast<size_t>(first) / 32];
  if (warp.arrived != warp.waited) return report("cluster barrier: a thread arrives twice without a wait in between"), false;
  ++warp.arrived;
  make_ready_warp(first);
  arrived_threads += 32;
  if (arrived_threads < fibers.size()) return true;
  arrived_threads = 0;
  ++complete_rounds;
  for (int other : parked) {
    ++rounds[static_cast<size_t>(other) / 32].waited;
    make_ready_warp(other);
  }
  parked.clear();
  return true;
}

bool cluster_wait(int first) {
  Rounds& warp = rounds[static_cast<size_t>(first) / 32];
  if (warp.arrived == warp.waited) return report("cluster barrier: a thread waits that did not arrive"), false;
  if (complete_rounds >= warp.arrived) {
    ++warp.waited;
    make_ready_warp(first);
    return true;
  }
  for (int l = 0; l < 32; ++l) fibers[static_cast<size_t>(first + l)].state = State::kAtClusterBarrier;
  parked.push_back(first);
  return true;
}

bool of_cluster(const Fiber& f) {
  return f.state == State::kInCollective && (f.kind == Collective::kClusterArrive || f.kind == Collective::kClusterWait);
}

const char* const kLanesApart = "cluster barrier: the lanes of a warp are at different barriers";

// All 32 lanes wait: run the collective for them. False after an error.
bool finish_collective(int first) {
  const void* in[32];
  void* out[32];
  Fiber* warp = &fibers[static_cast<size_t>(first)];
  for (int l = 0; l < 32; ++l) {
    if (warp[l].kind != warp->kind || warp[l].site != warp->site) {
      const bool cluster = of_cluster(*warp) || of_cluster(warp[l]);
      return report(cluster ? kLanesApart : "warp collective: lanes wait at different places"), false;
    }
    in[l] = warp[l].in;
    out[l] = warp[l].out;
  }
  if (warp->kind == Collective::kClusterArrive) return cluster_arrive(first);
  if (warp->kind == Collective::kClusterWait) return cluster_wait(first);
  if (warp->kind == Collective::kLoadMatrix)
    for (int l = 0; l < 32; ++l) {
      const auto* row = *static_cast<const unsigned char* const*>(in[l]);
      if (!in_shared(row)) return report("ldmatrix: row outside shared memory"), false;
      if (reinterpret_cast<uintptr_t>(row) % 16) report("ldmatrix: misaligned row");
      shadow_shared(static_cast<size_t>(row - shared_memory), 16, false, warp[l].who);
    }
  run_collective(warp->kind, in, out);
  make_ready_warp(first);
  return true;
}

// A thread of the running block cannot go on by itself. False after an error that leaves nothing to schedule.
bool settle(Fiber& f) {
  Block& block = blocks[static_cast<size_t>(f.rank)];
  if (f.state == State::kInCollective) {
    int& lanes = in_collective[static_cast<size_t>(f.who) / 32];
    if (++lanes < 32) return true;
    lanes = 0;
    return finish_collective(f.who / 32 * 32);
  }
  if (f.state == State::kDone) {
    const Rounds& warp = rounds[static_cast<size_t>(f.who) / 32];
    if (warp.arrived != warp.waited) report("cluster barrier: a thread leaves the kernel without the wait for its arrival");
  }
  ++(f.state == State::kDone ? block.done : block.waiting);
  if (block.done == now.threads) shadow_end_block();
  if (!block.waiting || block.waiting + block.done < now.threads) return true;
  if (block.done) report("barrier: some threads have already left the kernel");
  shadow_next_epoch();
  block.waiting = 0;
  for (int t = 0; t < now.threads; ++t)
    if (Fiber& other = fibers[static_cast<size_t>(f.rank * now.threads + t)]; other.state == State::kAtBarrier) make_ready(other);
  return true;
}

// Why nothing runs any more although not all threads are done.
void report_deadlock() {
  for (const Fiber& f : fibers) {
    if (f.state == State::kAtClusterBarrier)
      for (const Fiber& other : fibers)
        if (other.state == State::kDone) return report("cluster barrier: some threads have already left the kernel");
    if (!of_cluster(f)) continue;
    for (int l = 0; l < 32; ++l) {
      const State lane = fibers[static_cast<size_t>(f.who / 32 * 32 + l)].state;
      if (lane == State::kDone) return report("cluster barrier: some threads have already left the kernel");
      if (lane == State::kAtBarrier) return report(kLanesApart);
    }
  }
  report("deadlock: a warp collective or barrier that not all threads reach");
}

// The block that runs next, -1 if none can. One of a cluster keeps running for a while, between one step and thousands.
int choose_block() {
  const auto can_run = [](int rank) { return !blocks[static_cast<size_t>(rank)].ready.empty(); };
  const int count = static_cast<int>(blocks.size());
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
  for (int rank; (rank = choose_block()) >= 0;) {
    if (rank != now.rank) enter_block(rank);
    std::vector<int>& ready = blocks[static_cast<size_t>(rank)].ready;
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
  shadow_end_cluster();
  return true;
}

void start_cluster(const Shape& shape, int first) {
  const size_t threads = static_cast<size_t>(shape.cluster) * static_cast<size_t>(shape.threads);
  first_block_x = first % shape.grid_x;
  now = {0, shape.threads, first_block_x, first / shape.grid_x, shape.grid_x, 0};
  shadow_start_cluster(shape.cluster, shape.threads);
  enter_block(0);
  fibers.assign(threads, Fiber{});
  blocks.assign(static_cast<size_t>(shape.cluster), Block{});
  in_collective.assign(threads / 32, 0);
  parked.clear();
  arrived_threads = 0;
  complete_rounds = favours = 0;
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

void store_peer(float* own, int rank, float v) {
  void* const there = shadow_store_peer(own, rank, running->who);
  if (!there) stop();
  memcpy(there, &v, sizeof v);
  if (preempt && random_number() % static_cast<uint32_t>(preempt) == 0) leave(running->context);
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
