// Kernels of clusters for the tests of the source emulator: what is right, and its mistakes. `Case` and the names in
// tests/test_clusters.py have the same order.
#include "prim.cuh"

namespace qe {

enum Case {
  kRight, kFence, kOwnMemory, kGroups, kPeek,
  // At the cluster's barrier.
  kArriveTwice, kWaitAlone, kLeaveArrived, kBlockLeaves, kWarpLeaves, kLaneLeaves, kLanesApart, kSitesApart, kHalfAtBlockBarrier,
  // What is not ordered: messages.
  kNotBegun, kNoFence, kNoBox, kEnds, kReadEarly, kOtherBox, kOneWaits, kOtherGroupWaits, kTwoMessages, kNoRound, kWrite, kWriteLate,
  kWriteAfter, kRead, kCopy, kCopyLate, kToldOfWait, kToldOfRead, kToldToSend,
  // Boxes, and what a message says.
  kBoxTwice, kBoxMisaligned, kBoxOutOfBounds, kBoxNegative, kBoxTooLarge, kBoxRead, kWaitNotOpen, kWaitUnordered, kTooMany,
  kNeverFull, kOverBox, kNoSuchBlock, kOutOfBounds, kMisaligned, kMisalignedFour,
  // Memory of all blocks, and of one.
  kFenceEarly, kOwnMemoryEarly,
  // At a group's barrier, and what it does not order.
  kGroupZero, kGroupSixteen, kGroupHalfWarp, kGroupOfTwoBlocks, kTwoGroups, kGroupDisagrees, kGroupTooLarge, kGroupLanesApart,
  kGroupsOfLanes, kGroupLaneWaits, kGroupLeft, kGroupWaits, kNoGroupSync, kOtherGroup,
  kOtherGroupReads, kOtherGroupWrote,
};

struct ClusterArgs {
  const float* x;      // [threads]
  float* y;            // [blocks, threads]
  float* partial;      // [blocks, threads]
  uint32_t* counter;
  int what, blocks;    // of a cluster
  int reach;           // of messages: 0 to all blocks of it, 1 to peers, 2 to the own block
};

// Shared memory of every block.
struct Places {
  float *inbox, *second;  // [blocks of the cluster, threads]
  uint64_t* box;          // [8]
};

QE_DEV void cluster_round() {
  cluster_arrive();
  cluster_wait();
}
QE_DEV void put(float* p, float v) { store4(p, bits_as<uint32_t>(v)); }
QE_DEV float get(const float* p) { return bits_as<float>(load4(p)); }
QE_DEV float number() { return static_cast<float>(block_x() * block_threads() + thread_id()); }
QE_DEV void give_y(const ClusterArgs& p, float v) { put(p.y + block_x() * block_threads() + thread_id(), v); }

// What came to this thread from the same thread of every block.
QE_DEV float add_up(const ClusterArgs& p, const float* inbox) {
  float sum = 0.f;
  for (int from = 0; from < p.blocks; ++from) sum += get(inbox + from * block_threads() + thread_id());
  return sum;
}

// Three turns, the third into the memory of the first. All threads wait for the messages, or one of them in front of a barrier.
QE_DEV void exchange(const ClusterArgs& p, const Places& s) {
  const int t = thread_id(), threads = block_threads(), at = cluster_rank() * threads + t, group = 1 + t / 64;
  if (t == 0) {
    for (int turn = 0; turn < 3; ++turn) open_box(s.box + turn, 4 * p.blocks * threads);
    boxes_are_open();
  }
  cluster_round();
  for (int to = 0; to < p.blocks; ++to) send(s.inbox + at, s.box, to, number());
  wait_for_box(s.box);
  float sum = add_up(p, s.inbox);
  const float four[4] = {number() + 1.f, number() + 2.f, number() + 3.f, number() + 4.f};
  for (int to = 0; to < (t % 4 ? 0 : p.blocks); ++to) send(s.second + at, s.box + 1, to, four);
  if (t == 1) wait_for_box(s.box + 1);
  block_sync();
  sum += add_up(p, s.second);
  put(s.second + t, 0.f);  // whoever waited may overwrite what came
  cluster_round();
  for (int to = 0; to < p.blocks; ++to) send(s.inbox + at, s.box + 2, to, number() + 2.f);
  if (t % 64 == 2) wait_for_box(s.box + 2);
  group_sync(group, 64);
  give_y(p, sum + add_up(p, s.inbox));
}

QE_DEV bool reaches(const ClusterArgs& p, int from, int to) { return p.reach == 0 || (p.reach == 2) == (from == to); }

// One turn, and what may be wrong with it.
QE_DEV void disorder(const ClusterArgs& p, const Places& s) {
  const int t = thread_id(), threads = block_threads(), rank = cluster_rank(), what = p.what;
  const int at = what == kTwoMessages ? t % 64 : rank * threads + t;
  const int others = (p.reach == 2 ? rank : (rank + 1) % p.blocks) * threads + (t ^ 1);  // where another thread sends to
  const int all = 4 * threads * (p.reach == 0 ? p.blocks : p.reach == 1 ? p.blocks - 1 : 1);
  const auto tell = [&](uint64_t* box) {
    for (int to = 0; to < p.blocks; ++to)
      if (reaches(p, rank, to)) send(s.inbox + at, box, to, number());
  };
  if (what == kRead) put(s.inbox + others, 0.f);
  if (what == kNotBegun) cluster_arrive();
  if (t == 0 && what != kNoBox) {
    open_box(s.box, all);
    open_box(s.box + 1, 0);
    open_box(s.box + 2, what == kNoRound || what == kWriteAfter ? all : 0);
    if (what != kNoFence) boxes_are_open();
  }
  if (what != kNotBegun) cluster_arrive();
  cluster_wait();
  if (what == kWrite) put(s.inbox + others, 0.f);
  if (what == kCopy && t % 4 == 0) cp_async16(s.inbox + others - 1, p.x + t);
  tell(s.box);
  if (what == kEnds) return;
  if (what == kRead) give_y(p, get(s.inbox + others));
  if (what == kWriteLate) put(s.inbox + others, 0.f);
  if (what == kCopyLate && t % 4 == 0) cp_async16(s.inbox + others - 1, p.x + t);
  if (what == kOtherBox) wait_for_box(s.box + 1);
  if (what == kOneWaits ? t == 0 : what == kOtherGroupWaits ? t < 64 : what != kReadEarly && what != kOtherBox) wait_for_box(s.box);
  if (what == kOtherGroupWaits) group_sync(1 + t / 64, 64);
  if (what != kRead && what != kTwoMessages) give_y(p, get(s.inbox + others));
  if (what == kWriteAfter) {
    cluster_round();
    put(s.inbox + others, 0.f);
  }
  if (what == kNoRound || what == kWriteAfter) tell(s.box + 2);
  wait_for_box(s.box + (what == kNoRound || what == kWriteAfter ? 2 : 0));
}

// A message orders its own bytes and nothing else: not the wait, and not the read, that came before it.
QE_DEV void told(const ClusterArgs& p, const Places& s) {
  const int t = thread_id(), rank = cluster_rank(), group = 1 + t / 64, step = p.reach == 2 ? 0 : 1;
  if (t == 0) {
    for (int i = 0; i < 3; ++i) open_box(s.box + i, i < 2 || p.what == kToldToSend ? 4 : 0);
    boxes_are_open();
    put(s.second, 0.f);
  }
  cluster_round();
  float v = 0.f;
  if (t == 0) {
    send(s.inbox, s.box, rank, 1.f);
    wait_for_box(s.box);
    v = get(s.second);
    send(s.inbox + 1, s.box + 1, (rank + step) % p.blocks, 2.f);
  }
  if (t == 64) {
    wait_for_box(s.box + 1);
    if (p.what != kToldToSend) v = get(p.what == kToldOfWait ? s.inbox : s.second);
    if (p.what == kToldToSend) send(s.inbox, s.box + 2, (rank + p.blocks - step) % p.blocks, 3.f);
  }
  wait_for_box(s.box + 2);
  group_sync(group, 64);
  if (t == 65 && p.what == kToldOfRead) put(s.second, 1.f);
  give_y(p, v);
}

// One thread sends a 1 at a time to a peer, and one looks for the last of them first.
QE_DEV void peek(const ClusterArgs& p, const Places& s) {
  const int t = thread_id(), rank = cluster_rank(), count = 16;
  if (t == 0) {
    open_box(s.box, rank == 1 ? 4 * count : 0);
    boxes_are_open();
  }
  cluster_round();
  for (int i = 0; i < (rank == 0 && t == 0 ? count : 0); ++i) send(s.inbox + i, s.box, 1, 1.f);
  for (int i = count - 1; i >= (rank == 1 && t == 0 ? 0 : count); --i) put(p.y + i, get(s.inbox + i));
  wait_for_box(s.box);
}

QE_DEV void boxes(const ClusterArgs& p, const Places& s) {
  const int t = thread_id(), all = 4 * p.blocks * block_threads(), what = p.what;
  unsigned char* const bytes = reinterpret_cast<unsigned char*>(s.box);
  if (t == 0) {
    open_box(s.box, what == kTooMany ? all - 4 : what == kNeverFull ? all + 4 : what == kWaitUnordered ? 0 : all);
    if (what == kBoxTwice) open_box(s.box, all);
    if (what == kBoxMisaligned) open_box(reinterpret_cast<uint64_t*>(bytes + 12), 0);
    if (what == kBoxOutOfBounds) open_box(s.box + 8, 0);
    if (what == kBoxNegative) open_box(s.box + 1, -4);
    if (what == kBoxTooLarge) open_box(s.box + 1, 1 << 20);
    boxes_are_open();
  }
  if (what == kWaitUnordered) return t == 1 ? wait_for_box(s.box) : void();
  cluster_round();
  if (what == kWaitNotOpen) wait_for_box(s.box + 1);
  if (what == kBoxRead) give_y(p, get(reinterpret_cast<const float*>(s.box)));
  unsigned char* const to = reinterpret_cast<unsigned char*>(s.inbox + cluster_rank() * block_threads() + t);
  for (int rank = 0; rank < p.blocks; ++rank) send(reinterpret_cast<float*>(to), s.box, rank, number());
  if (what >= kOverBox && cluster_rank() == 1 && t == 0) {
    const int beyond = what == kOverBox      ? static_cast<int>(bytes - to)
                       : what == kOutOfBounds ? static_cast<int>(bytes - to) + 64
                       : what == kMisaligned  ? 2
                                              : 0;
    const float four[4] = {};
    if (what == kMisalignedFour) send(s.inbox + 1, s.box, 0, four);
    send(reinterpret_cast<float*>(to + beyond), s.box, what == kNoSuchBlock ? p.blocks : 0, 1.f);
  }
  wait_for_box(s.box);
}

// The last block to count adds up what all blocks wrote. The cluster's barrier stands where a block's usually does.
QE_DEV void fence(const ClusterArgs& p, uint32_t* last) {
  const int t = thread_id(), threads = block_threads();
  if (p.what == kFenceEarly) cluster_arrive();
  put(p.partial + block_x() * threads + t, static_cast<float>(block_x() + t));
  if (p.what == kFence) cluster_arrive();
  cluster_wait();
  if (t == 0) {
    device_fence();
    store4(last, count_up(p.counter, static_cast<uint32_t>(grid_x() - 1)) == static_cast<uint32_t>(grid_x() - 1));
  }
  block_sync();
  if (!load4(last)) return;
  device_fence();
  float sum = 0.f;
  for (int b = 0; b < grid_x(); ++b) sum += load_fresh(p.partial + b * threads + t);
  put(p.y + t, sum);
}

// A round of the cluster is a barrier of the block, too.
QE_DEV void own_memory(const ClusterArgs& p, float* values) {
  const int t = thread_id(), threads = block_threads();
  if (p.what == kOwnMemoryEarly) cluster_arrive();
  put(values + t, static_cast<float>(t));
  if (p.what == kOwnMemory) cluster_arrive();
  cluster_wait();
  give_y(p, get(values + (t + 33) % threads));
}

// Mistakes at the cluster's barrier itself.
QE_DEV void barriers(const ClusterArgs& p) {
  const int t = thread_id(), lane = t & 31;
  if (p.what == kArriveTwice) cluster_arrive();
  if (p.what != kWaitAlone && p.what != kLanesApart && p.what != kSitesApart) cluster_arrive();
  if (p.what == kLanesApart) lane < 16 ? cluster_arrive() : block_sync();
  if (p.what == kSitesApart) lane < 16 ? cluster_arrive() : cluster_arrive();
  if (p.what == kLeaveArrived) return;
  cluster_wait();
  if (p.what == kBlockLeaves && cluster_rank() == 1) return;
  if (p.what == kWarpLeaves && t >= 32) return;
  if (p.what == kLaneLeaves && lane == 5) return;
  if (p.what == kHalfAtBlockBarrier && t < 32) block_sync();
  cluster_round();
}

// Two groups of two warps; a thread reads what threads of its group wrote, and at the end what the other group wrote.
QE_DEV void groups(const ClusterArgs& p, float* values) {
  const int t = thread_id(), threads = block_threads(), mate = t ^ 33, group = 1 + t / 64;
  float sum = 0.f;
  for (int turn = 0; turn < 4; ++turn) {
    float* const now = values + (turn & 1) * threads;
    put(now + t, static_cast<float>(t + turn));
    if (p.what != kNoGroupSync) group_sync(group, 64);
    sum += get(now + mate);
    if (p.what == kOtherGroup) sum += get(now + (t ^ 64));
  }
  block_sync();
  if (p.what != kOtherGroupWrote) sum += get(values + (t ^ 64));
  if (p.what == kOtherGroupReads) sum += get(values);
  if (p.what == kOtherGroupWrote && group == 1) put(values + t, 0.f);
  for (int turn = 0; turn < 3; ++turn) group_sync(group, 64);
  if (p.what == kOtherGroupReads && t == 1) put(values, 0.f);
  if (p.what == kOtherGroupWrote && group == 2) sum += get(values + (t ^ 64));
  give_y(p, sum);
}

// Mistakes at a group's barrier itself.
QE_DEV void group_barriers(const ClusterArgs& p) {
  const int t = thread_id(), lane = t & 31, warp = t >> 5, group = 1 + t / 64;
  switch (p.what) {
    case kGroupZero: return group_sync(0, 64);
    case kGroupSixteen: return group_sync(16, 64);
    case kGroupHalfWarp: return group_sync(group, 48);
    case kGroupOfTwoBlocks: return group_sync(group, 2 * block_threads());
    case kGroupDisagrees: return group_sync(group, warp == 0 ? 96 : 64);
    case kGroupTooLarge:
      if (warp == 0) return;
      if (warp == 3) return block_sync();
      for (int turn = 0; turn < 4; ++turn) group_sync(1, 32);
      return;
    case kTwoGroups: group_sync(group, 64); return group_sync(group ^ 3, 64);
    case kGroupLanesApart: return lane < 16 ? group_sync(group, 64) : block_sync();
    case kGroupsOfLanes: return group_sync(lane < 16 ? 1 : 2, 64);
    case kGroupLaneWaits: return lane == 5 ? void() : group_sync(group, 64);
    case kGroupLeft: return warp == 3 ? void() : group_sync(group, 64);
    case kGroupWaits: return warp == 3 ? block_sync() : group_sync(group, 64);
  }
}

}  // namespace qe

QE_KERNEL void cluster_test(qe::ClusterArgs p) {
  QE_DYNAMIC_SHARED(shared);
  qe::wait_for_previous();
  float* const values = reinterpret_cast<float*>(shared);
  const int each = p.blocks * qe::block_threads();
  const qe::Places places{values, values + each, reinterpret_cast<uint64_t*>(values + 2 * each)};
  if (p.what == qe::kRight) return qe::exchange(p, places);
  if (p.what == qe::kPeek) return qe::peek(p, places);
  if (p.what == qe::kFence || p.what == qe::kFenceEarly) return qe::fence(p, reinterpret_cast<uint32_t*>(shared));
  if (p.what == qe::kOwnMemory || p.what == qe::kOwnMemoryEarly) return qe::own_memory(p, values);
  if (p.what >= qe::kArriveTwice && p.what <= qe::kHalfAtBlockBarrier) return qe::barriers(p);
  if (p.what >= qe::kToldOfWait && p.what <= qe::kToldToSend) return qe::told(p, places);
  if (p.what >= qe::kNotBegun && p.what <= qe::kCopyLate) return qe::disorder(p, places);
  if (p.what >= qe::kBoxTwice && p.what <= qe::kMisalignedFour) return qe::boxes(p, places);
  if (p.what >= qe::kGroupZero && p.what <= qe::kGroupWaits) return qe::group_barriers(p);
  qe::groups(p, values);
}
