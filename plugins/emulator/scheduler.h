// Threads of the cluster that runs: what each one waits for. Between simt.cpp, which runs them, and meet.cpp, where they meet.
#pragma once
#include "fiber.h"
#include "simt.h"

namespace qe_emu {

enum class State { kRunnable, kAtBarrier, kInCollective, kAtClusterBarrier, kAtGroupBarrier, kAtBox, kDone };

struct Fiber {
  Context context;
  State state = State::kRunnable;
  int who = 0, thread = 0, rank = 0;  // in the cluster, in its block; and its block in the cluster
  Collective kind{};
  int box = 0;  // of its block, that it waits for
  const void* in = nullptr;
  void* out = nullptr;
  const void* site = nullptr;
  bool waited = false;  // for the launch in front
  int looks = 0;        // at what other blocks write
  std::vector<std::vector<PendingCopy>> groups;
  std::vector<PendingCopy> open_group;
};

// Warps that meet at a named barrier.
struct WarpGroup {
  int threads = 0;           // 0: nobody has come yet
  std::vector<int> members;  // first threads of the warps
  std::vector<int> waiting;  // of them, now
};

struct Block {
  std::vector<int> ready;  // threads of the cluster
  int waiting = 0, done = 0;
  WarpGroup groups[kMostGroups + 1];
};

extern std::vector<Fiber> fibers;          // of the cluster that runs
extern std::vector<Block> running_blocks;  // of it

inline void make_ready(Fiber& f) {
  f.state = State::kRunnable;
  running_blocks[static_cast<size_t>(f.rank)].ready.push_back(f.who);
}

// Nobody waits anywhere yet.
void start_meetings();
// A thread of the running block cannot go on by itself. False after an error that leaves nothing to schedule.
bool settle(Fiber& f);
// Why nothing runs any more although not all threads are done.
void report_deadlock();

}  // namespace qe_emu
