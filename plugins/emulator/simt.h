// The source emulator: kernels compiled as host C++, one fiber per CUDA thread.
//
// What it models: random interleaving of threads (a new one per seed), block barriers, warp collectives, the fragment
// maps of mma and ldmatrix as the PTX ISA prints them, asynchronous copies that land as late as they may, and a shadow of
// every byte of shared and global memory that finds races, accesses out of bounds, misalignment and reads of bytes that
// nobody wrote. What it does not model: time, caches, the PTX behind the primitives (the PTX emulator does that), and
// weak memory order beyond one rule: what another block of the launch wrote may be read, by a fresh read, only after a
// counter showed that the other block had fenced it off before. Blocks run one after the other, in a random order, so that a
// block that waits for one that was not scheduled yet never ends, which is reported.
//
// Blocks of a cluster run at the same time, each with shared memory of its own; now and then one of them runs far ahead. A
// round of the cluster's barrier is what all threads arrive at and wait for. It orders accesses to shared memory: what came
// before a thread's arrival is ordered before what comes after another thread's wait. What comes between a thread's arrival
// and its wait is not ordered yet, and a round counts for a thread once it waited itself. Barriers of clusters are aligned:
// the lanes of a warp reach them together.
//
// Blocks write into each other's shared memory by messages. A message lands, data and count of bytes together, when the
// scheduler chooses: in any order, and at the latest when nothing else can run. It needs a box that its block opened and
// fenced before a round. Its bytes belong to nobody until the box has all bytes that it expects. Then they may be read or
// written by a thread that waited for the box, and by a thread that a barrier orders after one that did. A message orders
// nothing but its own bytes. A block with a box must not end before one of its threads waited for it.
//
// A named barrier is met by warps that are one group during the whole block, and it is aligned. It orders what the threads of
// the group do; only barriers of the block and rounds of the cluster order what threads of different groups do. Of reads of
// the same byte before and after a thread's arrival at a round, by different groups, the shadow remembers the later ones.
//
// Plain loads and stores of the kernels reach `on_access` through the hooks that -fsanitize=thread plants; the
// sanitizer's own runtime is not linked.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <set>
#include <string>
#include <vector>

namespace qe_emu {

constexpr size_t kSharedBytes = 232448;  // the most any supported chip has
constexpr int kMostClusterBlocks = 8;    // the most that every chip with clusters has without a special attribute
constexpr int kMostGroups = 15;          // of warps, in a block
extern unsigned char* shared_memory;     // of the running block

struct ThreadIndex {
  int thread, threads, block_x, block_y, grid_x, rank;  // rank: of the block in its cluster
};
extern ThreadIndex now;  // of the running fiber

enum class Collective {
  kLoadMatrix, kMmaS8, kMmaF16, kMmaBf16, kMmaF16K8, kShuffleXor, kBallot, kClusterArrive, kClusterWait, kGroupSync
};

// Called by the primitives, from a fiber.
void on_access(const void* p, size_t bytes, bool write, size_t alignment);
void barrier(const void* site);
void collective(Collective kind, const void* in, void* out, const void* site);
void on_fresh_read(const void* p, size_t bytes);
uint32_t count_up(uint32_t* counter, uint32_t last);
void device_fence();
void prefetch(const void* p);
void wait_for_previous();
void copy_async(void* to, const void* from);
void copy_commit();
void copy_wait(int pending);
void open_box(uint64_t* box, int bytes);
void boxes_are_open();
void send(float* own, uint64_t* box, int rank, const float* values, int count);
void wait_for_box(const uint64_t* box);

// Operands of the collectives, per lane.
struct MmaIn {
  uint32_t a[4], b[2];
  union {
    int32_t ci[4];
    float cf[4];
  };
};
struct ShuffleIn {
  float value;
  int mask;
};
struct GroupIn {
  int group, threads;
};
void run_collective(Collective kind, const void* const (&in)[32], void* const (&out)[32]);

// Memory that kernels may touch. Host addresses; writable buffers also remember who wrote what.
// Those that are not may be read before `wait_for_previous`, unless they are called x; `zeroed` ones have contents.
void add_buffer(const void* p, size_t bytes, bool writable, const char* name, bool zeroed = false);
void clear_buffers();

struct Shape {
  int grid_x, grid_y, threads;
  size_t shared_bytes;
  int cluster = 1;  // blocks
};
// Runs the kernel and returns what went wrong, each kind of error once.
std::set<std::string> launch(const Shape& shape, uint64_t seed, int preempt_every, const std::function<void()>& kernel);

// Between the scheduler (simt.cpp) and the memory model (shadow.cpp).
struct PendingCopy {
  void* to;
  const void* from;
};
[[gnu::cold]] void report(const std::string& what);
const std::set<std::string>& reports();
// Of the cluster's barrier: which round a warp arrives at next, and which one it waits for next.
struct Rounds {
  int16_t arrived = 0, waited = 0;
};
extern std::vector<Rounds> rounds;  // of each warp of the cluster
// `who` is a thread of the cluster: the threads of its block of rank 0 come first.
void shadow_start_launch(size_t shared_bytes);
void shadow_start_cluster(int blocks, int threads);
void shadow_enter_block(int rank);
void shadow_next_epoch();
void shadow_join_group(int who, int group);
void shadow_next_group_epoch(int group);
void shadow_end_block();
// False: the access is out of bounds and must not be carried out.
bool shadow_shared(size_t at, size_t bytes, bool write, int who);
// A message on its way. False: it must not be sent.
struct Message {
  int rank, box;  // of the block that gets it, and which of its boxes
  size_t at, bytes;
  unsigned char data[16];
};
bool shadow_open_box(const void* box, int bytes, int who);
void shadow_fence_boxes(int who);
bool shadow_send(Message& message, const void* own, const void* box, int who);
// True when its box has all bytes now.
bool shadow_land_message(const Message& message);
// Which of the block's boxes it is; -1 if the thread must not wait.
int shadow_find_box(const void* box, int who);
bool shadow_box_is_full(int box);
void shadow_has_waited(int box, int who);
bool shadow_global(const void* p, size_t bytes, bool write, bool fresh = false);
void shadow_count(const void* counter);
void shadow_fence();
bool thread_has_waited();
bool shadow_issue_copy(const PendingCopy& copy, int who);
void shadow_land_copy(const PendingCopy& copy, int who);
bool in_shared(const void* p);

}  // namespace qe_emu
