// What the memory model remembers of shared memory, and how accesses to it are ordered. Between shadow.cpp and boxes.cpp.
#pragma once
#include <algorithm>
#include <map>

#include "simt.h"

namespace qe_emu {

constexpr int16_t kNobody = -1;
constexpr uint32_t kNoEpoch = 0;
constexpr uint8_t kNoBox = 0, kIsBox = 255;
constexpr size_t kMostBoxes = kIsBox - 1;  // of a block

// A thread, counted in the cluster, and how often it had arrived at the cluster's barrier.
struct Who {
  int16_t thread, rounds;
};

// Every barrier of a block or of a group begins an epoch; their numbers grow.
struct SharedByte {
  Who writer{kNobody, 0}, reader{kNobody, 0};  // of several readers of an epoch the one with the most rounds
  uint32_t write_epoch = kNoEpoch, read_epoch = kNoEpoch;
  uint32_t readers = 0;  // warps of the block that read since its last barrier, with as many rounds as `reader`; bits
  int16_t rounds_of_other_readers = -1;
  bool copying = false;  // an asynchronous copy owns it
  uint8_t box = kNoBox;  // of the message that wrote it last, counted from 1; or kIsBox
};

// Warps that meet at a named barrier.
struct Group {
  uint32_t warps = 0, epoch = kNoEpoch;
};

// A thread waited for a box.
struct Wait {
  Who who;
  uint32_t epoch;
};

struct Box {
  size_t at = 0;
  int expected = 0, sent = 0, landed = 0;  // bytes
  bool fenced = false;
  int16_t fence_rounds = 0;
  std::vector<Wait> waits;
  std::vector<bool> known;  // by thread of the cluster: it waited, or a barrier orders it after a thread that did
};

// Of the blocks of this launch: until which epoch or round what they wrote was fenced off.
struct Until {
  uint32_t epoch = 0;
  int16_t rounds = 0;
};
using Released = std::map<int64_t, Until>;

struct BlockShadow {
  SharedByte* bytes;
  unsigned char* memory;
  uint32_t epoch;
  int first_warp;           // in the cluster
  Released seen, acquired;  // at a counter, and after its next fence
  bool ended = false;
  bool grouped = false;     // a named barrier was used
  uint8_t group_of_warp[32] = {};
  Group groups[kMostGroups + 1];
  std::vector<Box> boxes;
};
extern std::vector<BlockShadow> blocks;  // of the cluster that runs
extern BlockShadow* here;                // the running one
extern size_t shared_limit;

inline const Rounds& rounds_of(int who) { return rounds[static_cast<size_t>(who) / 32]; }
inline size_t place_of(const void* p) { return static_cast<size_t>(static_cast<const unsigned char*>(p) - shared_memory); }

// What a thread of the running block does now.
struct Access {
  Who who;
  int16_t waited;  // rounds
  uint32_t epoch;  // that it leaves behind
  // Barriers order it after what has a smaller epoch: of any thread of its block, and of the warps `mates`.
  uint32_t since, mates_since, mates;
  uint32_t warp;  // its own, as a bit

  explicit Access(int thread)
      : who{static_cast<int16_t>(thread), rounds_of(thread).arrived}, waited(rounds_of(thread).waited), epoch(here->epoch),
        since(epoch), mates_since(epoch), mates(1u << warp_of(thread)), warp(mates) {
    if (!here->grouped) return;
    if (const int group = here->group_of_warp[warp_of(thread)]) {
      mates = here->groups[group].warps;
      if (here->groups[group].epoch > since) epoch = mates_since = here->groups[group].epoch;
    }
  }
  static int warp_of(int thread) { return thread / 32 - here->first_warp; }

  // A barrier of the block, of the group or of the cluster lies between this and what another thread of the block did.
  bool after(Who other, uint32_t then) const {
    return then < since || other.rounds < waited || (then < mates_since && mates >> warp_of(other.thread) & 1);
  }
  // Another thread wrote or read the byte, and no barrier came in between.
  bool races_with_write(const SharedByte& b) const { return b.writer.thread != who.thread && !after(b.writer, b.write_epoch); }
  bool races_with_read(const SharedByte& b) const {
    if (b.read_epoch < since) return false;
    if (b.readers & ~mates) return b.reader.rounds >= waited;
    const int16_t last = b.reader.thread == who.thread ? b.rounds_of_other_readers : b.reader.rounds;
    return b.read_epoch >= mates_since && last >= waited;
  }

  void write(SharedByte& b) const { b.writer = who, b.write_epoch = epoch; }
  void read(SharedByte& b) const {
    const bool more = b.read_epoch >= since && b.reader.rounds == who.rounds;
    if (b.read_epoch != epoch) {
      b.rounds_of_other_readers = -1;
    } else if (b.reader.thread != who.thread) {
      b.rounds_of_other_readers = std::max(b.rounds_of_other_readers, std::min(who.rounds, b.reader.rounds));
      if (who.rounds < b.reader.rounds) return;
    }
    b.readers = more ? b.readers | warp : warp;
    b.reader = who, b.read_epoch = epoch;
  }
};

// An access by ordinary means to a byte that a message or a box uses. What it may do makes it an ordinary byte again.
[[gnu::cold]] void on_mail(SharedByte& b, int who, bool write);

}  // namespace qe_emu
