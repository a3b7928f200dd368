// What every byte remembers, and the rules that its next access must keep.
#include <string.h>

#include <algorithm>
#include <map>

#include "simt.h"

namespace qe_emu {

std::vector<Rounds> rounds;
unsigned char* shared_memory;

namespace {

alignas(128) unsigned char memory_of_blocks[kMostClusterBlocks * kSharedBytes];

constexpr int kNobody = -1;
constexpr uint32_t kNoEpoch = 0, kByPeer = ~0u;

// Rounds: how often the thread had arrived at the cluster's barrier. Of several readers of an epoch `reader` has the most.
struct SharedByte {
  int writer = kNobody, reader = kNobody;
  uint32_t write_epoch = kNoEpoch, read_epoch = kNoEpoch;
  int16_t write_rounds = 0, read_rounds = 0, rounds_of_other_readers = -1;
  bool copying = false;  // an asynchronous copy owns it
};

struct Buffer {
  const char* p;
  size_t bytes;
  bool writable;
  std::string name;
  std::vector<uint8_t> written;  // over the life of the buffer
  std::vector<int64_t> writer;   // in this launch: block and thread
  std::vector<uint32_t> epoch;   // of the writer's block, when it wrote
  std::vector<int16_t> rounds;   // that the writer had arrived at then
};

// Of the blocks of this launch: until which epoch or round what they wrote was fenced off.
struct Until {
  uint32_t epoch = 0;
  int16_t rounds = 0;
};
using Released = std::map<int64_t, Until>;
std::map<const void*, Released> counted;  // what each counter's arrivals had fenced off
Released fenced;

struct BlockShadow {
  SharedByte* bytes;
  uint32_t epoch;
  Released seen, acquired;  // at a counter, and after its next fence
  bool ended = false;
  int stored_rounds = -1;   // the most that a peer had arrived at when it stored into this block
};
std::vector<BlockShadow> blocks(1);
BlockShadow* here = blocks.data();  // the running one

std::vector<SharedByte> shared_bytes;
std::vector<Buffer> buffers;
std::set<std::string> errors;
size_t shared_limit = 0;
uint32_t last_epoch = kNoEpoch;
int block_threads = 0;

int64_t whoami() { return (static_cast<int64_t>(now.block_y) << 40) | (static_cast<int64_t>(now.block_x) << 12) | now.thread; }
int64_t block_of(int64_t who) { return who >> 12; }
int in_cluster() { return now.rank * block_threads + now.thread; }
const Rounds& rounds_of(int who) { return rounds[static_cast<size_t>(who) / 32]; }

// A thread of the running block, now.
struct Access {
  int who;
  uint32_t epoch;
  int16_t arrived, waited;
  explicit Access(int thread) : who(thread), epoch(here->epoch), arrived(rounds_of(who).arrived), waited(rounds_of(who).waited) {}
};

// Another thread wrote or read the byte, and neither a barrier of the block nor one of the cluster came in between.
bool written_now(const SharedByte& b, const Access& a) {
  return (b.write_epoch == a.epoch || b.write_epoch == kByPeer) && b.writer != a.who && b.write_rounds >= a.waited;
}
bool read_now(const SharedByte& b, const Access& a) {
  return b.read_epoch == a.epoch && (b.reader == a.who ? b.rounds_of_other_readers : b.read_rounds) >= a.waited;
}

void note_write(SharedByte& b, const Access& a, uint32_t epoch) {
  b.writer = a.who, b.write_epoch = epoch, b.write_rounds = a.arrived;
}
void note_read(SharedByte& b, const Access& a) {
  if (b.read_epoch != a.epoch) {
    b.rounds_of_other_readers = -1;
  } else if (b.reader != a.who) {
    b.rounds_of_other_readers = std::max(b.rounds_of_other_readers, std::min(a.arrived, b.read_rounds));
    if (a.arrived < b.read_rounds) return;
  }
  b.reader = a.who, b.read_rounds = a.arrived, b.read_epoch = a.epoch;
}

Buffer* find(const void* p, size_t slack = 0) {
  const char* c = static_cast<const char*>(p);
  for (Buffer& b : buffers)
    if (c + slack >= b.p && c < b.p + b.bytes + slack) return &b;
  return nullptr;
}

}  // namespace

void report(const std::string& what) { errors.insert(what); }
const std::set<std::string>& reports() { return errors; }

bool in_shared(const void* p) {
  const auto* c = static_cast<const unsigned char*>(p);
  return c >= shared_memory && c < shared_memory + kSharedBytes;
}

void shadow_start_launch(size_t bytes) {
  errors.clear();
  shared_limit = bytes;
  for (Buffer& b : buffers) std::fill(b.writer.begin(), b.writer.end(), kNobody);
  counted.clear(), fenced.clear();
}

void shadow_start_cluster(int count, int threads) {
  block_threads = threads;
  rounds.assign(static_cast<size_t>(count) * static_cast<size_t>(threads) / 32, Rounds{});
  shared_bytes.resize(std::max(shared_bytes.size(), static_cast<size_t>(count) * kSharedBytes));
  blocks.clear();
  for (size_t rank = 0; rank < static_cast<size_t>(count); ++rank) {
    SharedByte* const bytes = shared_bytes.data() + rank * kSharedBytes;
    std::fill(bytes, bytes + shared_limit, SharedByte{});
    memset(memory_of_blocks + rank * kSharedBytes, 0xA5, shared_limit);
    blocks.push_back({bytes, ++last_epoch, {}, {}});
  }
}

void shadow_enter_block(int rank) {
  here = &blocks[static_cast<size_t>(rank)];
  shared_memory = memory_of_blocks + static_cast<size_t>(rank) * kSharedBytes;
}

void shadow_next_epoch() { here->epoch = ++last_epoch; }
void shadow_end_block() { here->ended = true; }

// A block that waits for a round has not ended before it; a store that came before an arrival at that round is safe.
void shadow_end_cluster() {
  for (size_t rank = 0; rank < blocks.size(); ++rank)
    if (blocks[rank].stored_rounds >= rounds_of(static_cast<int>(rank) * block_threads).waited)
      report("store to a peer: no cluster barrier afterwards keeps it from ending before");
}

void shadow_count(const void* counter) {
  for (const auto& [block, until] : counted[counter]) here->seen[block] = until;
  const int64_t own = block_of(whoami());
  if (fenced.count(own)) counted[counter][own] = fenced[own];
}

// What the block wrote before its last barrier; and what its counter showed can be read from now on.
void shadow_fence() {
  Until& until = fenced[block_of(whoami())];
  until = {here->epoch, std::max(until.rounds, rounds_of(in_cluster()).waited)};
  for (const auto& [block, released] : here->seen) here->acquired[block] = released;
}

bool shadow_shared(size_t at, size_t bytes, bool write, int who) {
  if (at + bytes > shared_limit) return report("shared memory: access out of bounds"), false;
  const Access a(who);
  SharedByte* const all = here->bytes;
  for (size_t i = at; i < at + bytes; ++i) {
    SharedByte& b = all[i];
    if (b.copying) report("shared memory: access to bytes that an asynchronous copy still owns");
    if (write) {
      if (written_now(b, a)) report("shared memory: race of two writes");
      if (read_now(b, a)) report("shared memory: race of a write with a read");
      note_write(b, a, a.epoch);
    } else {
      if (b.writer == kNobody) report("shared memory: read of bytes that nobody wrote");
      if (written_now(b, a))
        report(b.write_epoch == kByPeer ? "shared memory: race of a read with a peer's store"
                                        : "shared memory: race of a read with a write");
      note_read(b, a);
    }
  }
  return true;
}

void* shadow_store_peer(const void* own, int rank, int who) {
  const size_t at = static_cast<size_t>(static_cast<const unsigned char*>(own) - shared_memory);
  if (rank < 0 || rank >= static_cast<int>(blocks.size()))
    return report("store to a peer: the cluster has no such block"), nullptr;
  if (!in_shared(own) || at + sizeof(float) > shared_limit)
    return report("store to a peer: out of bounds of shared memory"), nullptr;
  if (at % sizeof(float)) report("store to a peer: misaligned");
  void* const there = memory_of_blocks + static_cast<size_t>(rank) * kSharedBytes + at;
  if (rank == now.rank) return shadow_shared(at, sizeof(float), true, who), there;
  BlockShadow& peer = blocks[static_cast<size_t>(rank)];
  const Access a(who);
  if (!a.waited) report("store to a peer: no cluster barrier before it shows that the peer has begun");
  if (peer.ended) report("store to a peer: the peer has ended");
  peer.stored_rounds = std::max(peer.stored_rounds, static_cast<int>(a.arrived));
  for (size_t i = at; i < at + sizeof(float); ++i) {
    SharedByte& b = peer.bytes[i];
    if (b.copying) report("store to a peer: over bytes that an asynchronous copy still owns");
    if (b.writer != who && b.writer != kNobody && b.write_rounds >= a.waited)
      report("store to a peer: race with another write");
    if (b.reader != kNobody && b.read_rounds >= a.waited) report("store to a peer: race with a read of the peer");
    note_write(b, a, kByPeer);
  }
  return there;
}

bool shadow_issue_copy(const PendingCopy& copy, int who) {
  const size_t at = static_cast<size_t>(static_cast<unsigned char*>(copy.to) - shared_memory);
  if (!in_shared(copy.to) || at + 16 > shared_limit) return report("asynchronous copy: target out of bounds"), false;
  if (reinterpret_cast<uintptr_t>(copy.to) % 16 || reinterpret_cast<uintptr_t>(copy.from) % 16)
    return report("asynchronous copy: misaligned"), false;
  const Access a(who);
  for (size_t i = at; i < at + 16; ++i) {
    SharedByte& b = here->bytes[i];
    if (b.copying) report("asynchronous copy: over bytes of another one in flight");
    if (read_now(b, a)) report("asynchronous copy: over bytes that another thread may still read");
    if (written_now(b, a)) report("asynchronous copy: over bytes that another thread writes");
    b.copying = true;
  }
  return shadow_global(copy.from, 16, false);
}

void shadow_land_copy(const PendingCopy& copy, int who) {
  const size_t at = static_cast<size_t>(static_cast<unsigned char*>(copy.to) - shared_memory);
  for (size_t i = at; i < at + 16; ++i) here->bytes[i].copying = false;
  shadow_shared(at, 16, true, who);
  if (const Buffer* b = find(copy.from); b && static_cast<const char*>(copy.from) + 16 <= b->p + b->bytes)
    memcpy(copy.to, copy.from, 16);
}

bool shadow_global(const void* p, size_t bytes, bool write, bool fresh) {
  Buffer* b = find(p);
  const char* c = static_cast<const char*>(p);
  if (!b || c + bytes > b->p + b->bytes) {
    const Buffer* near = b ? b : find(p, 1 << 12);
    report(std::string("global memory: ") + (write ? "write" : "read") + " out of bounds" +
           (near ? " of " + near->name : ""));
    return false;
  }
  if (write && !b->writable) return report("global memory: write to the input " + b->name), false;
  if ((b->writable || b->name == "x") && !thread_has_waited())
    report("global memory: access to " + b->name + " before the launch in front has ended");
  if (!b->writable) return true;
  const size_t at = static_cast<size_t>(c - b->p);
  for (size_t i = at; i < at + bytes; ++i) {
    const int64_t writer = b->writer[i];
    if (write && fresh) {
      b->written[i] = 1;  // a counter
    } else if (write) {
      if (writer != kNobody && writer != whoami()) report("global memory: two threads write the same byte of " + b->name);
      b->writer[i] = whoami();
      b->epoch[i] = here->epoch;
      b->rounds[i] = rounds_of(in_cluster()).arrived;
      b->written[i] = 1;
    } else {
      if (!b->written[i]) report("global memory: read of bytes of " + b->name + " that nobody wrote");
      if (writer == kNobody || block_of(writer) == block_of(whoami())) continue;
      const auto until = here->acquired.find(block_of(writer));
      if (!fresh || until == here->acquired.end() ||
          (b->epoch[i] >= until->second.epoch && b->rounds[i] >= until->second.rounds))
        report("global memory: read of " + b->name + " that another block writes in the same launch");
    }
  }
  return true;
}

void add_buffer(const void* p, size_t bytes, bool writable, const char* name, bool zeroed) {
  const size_t tracked = writable ? bytes : 0;
  buffers.push_back({static_cast<const char*>(p), bytes, writable, name, std::vector<uint8_t>(tracked, zeroed),
                     std::vector<int64_t>(tracked, kNobody), std::vector<uint32_t>(tracked, 0), std::vector<int16_t>(tracked, 0)});
}

void clear_buffers() { buffers.clear(); }

}  // namespace qe_emu
