// Kernels of clusters for the tests of the source emulator: one exchange that is right, and its mistakes. `Case` and the names
// in tests/test_clusters.py have the same order.
#include "prim.cuh"

namespace qe {

enum Case {
  kRight, kFence, kOwnMemory,
  kArriveTwice, kWaitAlone, kLeaveArrived, kBlockLeaves, kWarpLeaves, kLaneLeaves, kLanesApart, kSitesApart, kHalfAtBlockBarrier,
  kNotBegun, kEnded, kReadEarly, kReadBetween, kTwoWriters, kOwnWrite, kOwnRead, kCopy,
  kNoSuchBlock, kOutOfBounds, kMisaligned, kFenceEarly, kOwnMemoryEarly,
};

struct ClusterArgs {
  const float* x;      // [threads]
  float* y;            // [blocks, threads]
  float* partial;      // [blocks, threads]
  uint32_t* counter;
  int what, blocks;    // of a cluster
};

QE_DEV void cluster_round() {
  cluster_arrive();
  cluster_wait();
}

// Every thread gives a number to the same thread of every block, and adds up what it got.
QE_DEV void exchange(const ClusterArgs& p, float* inbox) {
  const int t = thread_id(), threads = block_threads(), rank = cluster_rank();
  float sum = 0.f;
  const int turns = p.what == kRight ? 3 : p.what == kOwnRead ? 2 : 1;
  for (int turn = 0; turn < turns; ++turn) {
    if (p.what != kNotBegun && (p.what != kOwnRead || !turn)) cluster_round();
    if (p.what == kOwnWrite) store4(inbox + (rank + 1) % p.blocks * threads + t, 0u);
    if (p.what == kCopy && t % 4 == 0) cp_async16(inbox + (rank + 1) % p.blocks * threads + t, p.x + t);
    for (int to = 0; to < p.blocks; ++to)
      store_peer(inbox + (p.what == kTwoWriters ? 0 : rank * threads) + t, to, static_cast<float>(block_x() * threads + t + turn));
    if (p.what == kEnded) return;
    if (p.what == kReadBetween) cluster_arrive();
    if (p.what != kReadEarly && p.what != kReadBetween) cluster_round();
    for (int from = 0; from < p.blocks; ++from) sum += bits_as<float>(load4(inbox + (p.what == kTwoWriters ? 0 : from * threads) + t));
    if (p.what == kReadBetween) cluster_wait();
  }
  store4(p.y + block_x() * threads + t, bits_as<uint32_t>(sum));
}

// The last block to count adds up what all blocks wrote. The cluster's barrier stands where a block's usually does.
QE_DEV void fence(const ClusterArgs& p, uint32_t* last) {
  const int t = thread_id(), threads = block_threads();
  if (p.what == kFenceEarly) cluster_arrive();
  store4(p.partial + block_x() * threads + t, bits_as<uint32_t>(static_cast<float>(block_x() + t)));
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
  store4(p.y + t, bits_as<uint32_t>(sum));
}

// A round of the cluster is a barrier of the block, too.
QE_DEV void own_memory(const ClusterArgs& p, float* values) {
  const int t = thread_id(), threads = block_threads();
  if (p.what == kOwnMemoryEarly) cluster_arrive();
  store4(values + t, bits_as<uint32_t>(static_cast<float>(t)));
  if (p.what == kOwnMemory) cluster_arrive();
  cluster_wait();
  store4(p.y + block_x() * threads + t, load4(values + (t + 33) % threads));
}

// Mistakes at the barrier itself.
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

QE_DEV void one_store(const ClusterArgs& p, float* inbox) {
  cluster_round();
  unsigned char* const there = reinterpret_cast<unsigned char*>(inbox);
  const int beyond = p.what == kOutOfBounds ? 4 * p.blocks * block_threads() : p.what == kMisaligned ? 2 : 0;
  if (cluster_rank() == 1 && thread_id() == 0)
    store_peer(reinterpret_cast<float*>(there + beyond), p.what == kNoSuchBlock ? p.blocks : 0, 1.f);
  cluster_round();
}

}  // namespace qe

QE_KERNEL void cluster_test(qe::ClusterArgs p) {
  QE_DYNAMIC_SHARED(shared);
  qe::wait_for_previous();
  float* const inbox = reinterpret_cast<float*>(shared);
  if (p.what == qe::kFence || p.what == qe::kFenceEarly) return qe::fence(p, reinterpret_cast<uint32_t*>(shared));
  if (p.what == qe::kOwnMemory || p.what == qe::kOwnMemoryEarly) return qe::own_memory(p, inbox);
  if (p.what >= qe::kArriveTwice && p.what <= qe::kHalfAtBlockBarrier) return qe::barriers(p);
  if (p.what >= qe::kNoSuchBlock && p.what <= qe::kMisaligned) return qe::one_store(p, inbox);
  qe::exchange(p, inbox);
}
