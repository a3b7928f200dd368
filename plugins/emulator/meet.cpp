// Where threads meet: collectives of a warp, and the barriers of a block, of some of its warps, and of a cluster.
#include <algorithm>

#include "scheduler.h"

namespace qe_emu {

namespace {

std::vector<int> in_collective;  // lanes of each warp that wait for one
std::vector<int> parked;         // first threads of the warps that wait for a round of the cluster's barrier
size_t arrived_threads = 0;      // in the round that is not complete
int complete_rounds = 0;

const char* const kLanesApart = "cluster barrier: the lanes of a warp are at different barriers";
const char* const kGroupLanesApart = "group barrier: the lanes of a warp are at different barriers";
const char* const kLeft = "cluster barrier: some threads have already left the kernel";

void make_ready_warp(int first) {
  for (int l = 0; l < 32; ++l) make_ready(fibers[static_cast<size_t>(first + l)]);
}

void park_warp(int first, State state, std::vector<int>& where) {
  for (int l = 0; l < 32; ++l) fibers[static_cast<size_t>(first + l)].state = state;
  where.push_back(first);
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
  park_warp(first, State::kAtClusterBarrier, parked);
  return true;
}

// Why the warp cannot meet this group, or null.
const char* refuse(const Block& block, const GroupIn& in, int first) {
  if (in.group < 1 || in.group > kMostGroups) return "group barrier: groups have the numbers 1 to 15";
  if (in.threads < 32 || in.threads % 32 || in.threads > now.threads)
    return "group barrier: a group has whole warps, and no more than its block";
  for (int other = 1; other <= kMostGroups; ++other) {
    const std::vector<int>& members = block.groups[other].members;
    if (other != in.group && std::count(members.begin(), members.end(), first)) return "group barrier: a warp is in two groups";
  }
  const WarpGroup& group = block.groups[in.group];
  if (group.threads && group.threads != in.threads) return "group barrier: its threads disagree about how many they are";
  const bool complete = group.members.size() * 32 == static_cast<size_t>(in.threads);
  if (complete && !std::count(group.members.begin(), group.members.end(), first))
    return "group barrier: more threads than the group has";
  return nullptr;
}

bool group_sync(const void* const (&in)[32], int first) {
  const auto& at = *static_cast<const GroupIn*>(in[0]);
  for (const void* lane : in) {
    const auto& other = *static_cast<const GroupIn*>(lane);
    if (other.group != at.group || other.threads != at.threads) return report(kGroupLanesApart), false;
  }
  Block& block = running_blocks[static_cast<size_t>(now.rank)];
  if (const char* why = refuse(block, at, first)) return report(why), false;
  WarpGroup& group = block.groups[at.group];
  group.threads = at.threads;
  if (!std::count(group.members.begin(), group.members.end(), first)) {
    group.members.push_back(first);
    shadow_join_group(first, at.group);
  }
  park_warp(first, State::kAtGroupBarrier, group.waiting);
  if (group.waiting.size() * 32 < static_cast<size_t>(at.threads)) return true;
  shadow_next_group_epoch(at.group);
  for (int other : group.waiting) make_ready_warp(other);
  group.waiting.clear();
  return true;
}

bool of_cluster(const Fiber& f) {
  return f.state == State::kInCollective && (f.kind == Collective::kClusterArrive || f.kind == Collective::kClusterWait);
}
bool of_group(const Fiber& f) { return f.state == State::kInCollective && f.kind == Collective::kGroupSync; }

// All 32 lanes wait: run the collective for them. False after an error.
bool finish_collective(int first) {
  const void* in[32];
  void* out[32];
  Fiber* warp = &fibers[static_cast<size_t>(first)];
  for (int l = 0; l < 32; ++l) {
    if (warp[l].kind != warp->kind || warp[l].site != warp->site) {
      if (of_cluster(*warp) || of_cluster(warp[l])) return report(kLanesApart), false;
      if (of_group(*warp) || of_group(warp[l])) return report(kGroupLanesApart), false;
      return report("warp collective: lanes wait at different places"), false;
    }
    in[l] = warp[l].in;
    out[l] = warp[l].out;
  }
  if (warp->kind == Collective::kClusterArrive) return cluster_arrive(first);
  if (warp->kind == Collective::kClusterWait) return cluster_wait(first);
  if (warp->kind == Collective::kGroupSync) return group_sync(in, first);
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

// A lane of a warp waits, and another lane of it never comes.
const char* why_lanes_wait(const Fiber& f) {
  const char* const apart = of_cluster(f) ? kLanesApart : of_group(f) ? kGroupLanesApart : nullptr;
  for (int l = 0; apart && l < 32; ++l) {
    const State lane = fibers[static_cast<size_t>(f.who / 32 * 32 + l)].state;
    if (lane == State::kDone && of_cluster(f)) return kLeft;
    if (lane == State::kAtBarrier || (lane == State::kDone && of_group(f))) return apart;
  }
  return nullptr;
}

const char* why_it_waits(const Fiber& f) {
  if (f.state == State::kAtBox) return "deadlock: a box that never gets all bytes that it expects";
  if (f.state == State::kAtGroupBarrier) return "group barrier: some threads of the group never reach it";
  if (f.state == State::kAtClusterBarrier)
    for (const Fiber& other : fibers)
      if (other.state == State::kDone) return kLeft;
  return why_lanes_wait(f);
}

}  // namespace

void start_meetings() {
  in_collective.assign(fibers.size() / 32, 0);
  parked.clear();
  arrived_threads = 0;
  complete_rounds = 0;
}

bool settle(Fiber& f) {
  if (f.state == State::kAtBox) return true;
  Block& block = running_blocks[static_cast<size_t>(f.rank)];
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
    if (Fiber& other = fibers[static_cast<size_t>(f.rank * now.threads + t)]; other.state == State::kAtBarrier)
      make_ready(other);
  return true;
}

void report_deadlock() {
  bool said = false;
  for (const Fiber& f : fibers)
    if (const char* why = why_it_waits(f)) report(why), said = true;
  if (!said) report("deadlock: a warp collective or barrier that not all threads reach");
}

}  // namespace qe_emu
