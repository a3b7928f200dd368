// Messages between the blocks of a cluster: what they may do to shared memory, and who may read what came.
#include <string.h>

#include "shadow.h"

namespace qe_emu {

namespace {

constexpr int kMostBoxBytes = (1 << 20) - 1;  // that an mbarrier counts

Box* box_at(BlockShadow& block, size_t at) {
  for (Box& box : block.boxes)
    if (box.at == at) return &box;
  return nullptr;
}

// The thread waited for the box, or a barrier orders it after a thread that did.
bool knows(Box& box, const Access& a) {
  if (box.known.empty()) box.known.resize(rounds.size() * 32);
  const auto thread = static_cast<size_t>(a.who.thread);
  if (box.known[thread]) return true;
  for (const Wait& wait : box.waits)
    if (a.after(wait.who, wait.epoch)) return box.known[thread] = true;
  return false;
}

// Why the thread cannot be sure that the box is open, or null.
const char* refuse(const BlockShadow& block, const Box& box, const Access& a) {
  const SharedByte& opened = block.bytes[box.at];
  if (!box.fenced) return "message: its box may not be open yet, because no fence came after its opening";
  const bool sees = &block == here ? !a.races_with_write(opened) : box.fence_rounds < a.waited;
  return sees ? nullptr : "message: its box may not be open yet, because no cluster barrier came after its opening";
}

// All bytes of the box had come, and a barrier orders the thread after one that waited for them.
bool may_overwrite(const Box& box, const Access& a, bool own) {
  for (const Wait& wait : box.waits) {
    if (own ? wait.who.thread == a.who.thread || a.after(wait.who, wait.epoch) : wait.who.rounds < a.waited) return true;
  }
  return false;
}

// A message to one byte. To a peer only rounds of the cluster's barrier order it after what others did there.
void write_by_message(SharedByte& b, BlockShadow& block, const Access& a, uint8_t box) {
  const bool own = &block == here;
  if (b.copying) report("message: over bytes that an asynchronous copy still owns");
  if (b.box == kIsBox) {
    report("message: over a box");
  } else if (b.box) {
    if (!may_overwrite(block.boxes[b.box - 1u], a, own)) report("message: race with another message");
  } else if (own ? a.races_with_write(b) : b.writer.thread != kNobody && b.writer.rounds >= a.waited) {
    report("message: race with a write");
  }
  if (own ? a.races_with_read(b) : b.reader.thread != kNobody && b.reader.rounds >= a.waited)
    report("message: race with a read");
  if (b.box == kIsBox) return;
  b.writer = a.who, b.write_epoch = kNoEpoch;
  b.box = box;
}

}  // namespace

void on_mail(SharedByte& b, int who, bool write) {
  if (b.box == kIsBox) return report("shared memory: a box is read or written like other memory");
  if (!knows(here->boxes[b.box - 1u], Access(who)))
    return report(write ? "shared memory: race of a write with a message"
                        : "shared memory: read of bytes of a message before its box was waited for");
  if (write) b.box = kNoBox;
}

bool shadow_open_box(const void* box, int bytes, int who) {
  const size_t at = place_of(box);
  if (!in_shared(box) || at + sizeof(uint64_t) > shared_limit) return report("box: out of bounds of shared memory"), false;
  if (at % sizeof(uint64_t)) return report("box: misaligned"), false;
  if (bytes < 0 || bytes > kMostBoxBytes) return report("box: it cannot expect that many bytes"), false;
  if (box_at(*here, at)) return report("box: it is opened twice"), false;
  if (here->boxes.size() == kMostBoxes) return report("box: more of them in a block than the emulator knows"), false;
  shadow_shared(at, sizeof(uint64_t), true, who);
  for (size_t i = at; i < at + sizeof(uint64_t); ++i) here->bytes[i].box = kIsBox;
  Box opened;
  opened.at = at, opened.expected = bytes;
  here->boxes.push_back(std::move(opened));
  return true;
}

void shadow_fence_boxes(int who) {
  for (Box& box : here->boxes)
    if (here->bytes[box.at].writer.thread == who && !box.fenced) box.fenced = true, box.fence_rounds = rounds_of(who).arrived;
}

bool shadow_send(Message& message, const void* own, const void* box, int who) {
  const size_t at = place_of(own);
  if (message.rank < 0 || message.rank >= static_cast<int>(blocks.size()))
    return report("message: the cluster has no such block"), false;
  if (!in_shared(own) || at + message.bytes > shared_limit) return report("message: out of bounds of shared memory"), false;
  if (at % message.bytes) return report("message: misaligned"), false;
  BlockShadow& block = blocks[static_cast<size_t>(message.rank)];
  if (block.ended) return report("message: its block has ended"), false;
  Box* const to = in_shared(box) ? box_at(block, place_of(box)) : nullptr;
  if (!to) return report("message: no box is open there"), false;
  const Access a(who);
  if (const char* why = refuse(block, *to, a)) report(why);
  to->sent += static_cast<int>(message.bytes);
  if (to->sent > to->expected) return report("message: its box gets more bytes than it expects"), false;
  message.at = at;
  message.box = static_cast<int>(to - block.boxes.data());
  for (size_t i = at; i < at + message.bytes; ++i)
    write_by_message(block.bytes[i], block, a, static_cast<uint8_t>(message.box + 1));
  return true;
}

bool shadow_land_message(const Message& message) {
  BlockShadow& block = blocks[static_cast<size_t>(message.rank)];
  Box& box = block.boxes[static_cast<size_t>(message.box)];
  memcpy(block.memory + message.at, message.data, message.bytes);
  box.landed += static_cast<int>(message.bytes);
  return box.landed == box.expected;
}

int shadow_find_box(const void* box, int who) {
  Box* const found = in_shared(box) ? box_at(*here, place_of(box)) : nullptr;
  if (!found) return report("box: a thread waits for one that is not open"), -1;
  const Access a(who);
  if (a.races_with_write(here->bytes[found->at])) report("box: a thread waits for it, and no barrier came after its opening");
  return static_cast<int>(found - here->boxes.data());
}

bool shadow_box_is_full(int box) {
  const Box& b = here->boxes[static_cast<size_t>(box)];
  return b.landed == b.expected;
}

void shadow_has_waited(int number, int who) {
  Box& box = here->boxes[static_cast<size_t>(number)];
  const Access a(who);
  if (knows(box, a)) return;
  box.known[static_cast<size_t>(who)] = true;
  box.waits.push_back({a.who, a.epoch});
}

}  // namespace qe_emu
