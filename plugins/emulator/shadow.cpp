// What every byte remembers, and the rules that its next access must keep.
#include "shadow.h"

#include <string.h>

namespace qe_emu {

std::vector<Rounds> rounds;
unsigned char* shared_memory;
std::vector<BlockShadow> blocks(1);
BlockShadow* here = blocks.data();
size_t shared_limit = 0;

namespace {

alignas(128) unsigned char memory_of_blocks[kMostClusterBlocks * kSharedBytes];

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

std::map<const void*, Released> counted;  // what each counter's arrivals had fenced off
Released fenced;

std::vector<SharedByte> shared_bytes;
std::vector<Buffer> buffers;
std::set<std::string> errors;
uint32_t last_epoch = kNoEpoch;
int block_threads = 0;

int64_t whoami() { return (static_cast<int64_t>(now.block_y) << 40) | (static_cast<int64_t>(now.block_x) << 12) | now.thread; }
int64_t block_of(int64_t who) { return who >> 12; }
int in_cluster() { return now.rank * block_threads + now.thread; }

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
  blocks.assign(static_cast<size_t>(count), BlockShadow{});
  for (size_t rank = 0; rank < blocks.size(); ++rank) {
    BlockShadow& block = blocks[rank];
    block.bytes = shared_bytes.data() + rank * kSharedBytes;
    block.memory = memory_of_blocks + rank * kSharedBytes;
    block.epoch = ++last_epoch;
    block.first_warp = static_cast<int>(rank) * threads / 32;
    std::fill(block.bytes, block.bytes + shared_limit, SharedByte{});
    memset(block.memory, 0xA5, shared_limit);
  }
}

void shadow_enter_block(int rank) {
  here = &blocks[static_cast<size_t>(rank)];
  shared_memory = here->memory;
}

void shadow_next_epoch() { here->epoch = ++last_epoch; }

void shadow_join_group(int who, int group) {
  const int warp = Access::warp_of(who);
  here->grouped = true;
  here->group_of_warp[warp] = static_cast<uint8_t>(group);
  here->groups[group].warps |= 1u << warp;
}
void shadow_next_group_epoch(int group) { here->groups[group].epoch = ++last_epoch; }

void shadow_end_block() {
  here->ended = true;
  for (const Box& box : here->boxes)
    if (box.expected && box.waits.empty())
      report("box: its block ends without a wait for it, and peers may still write into the block");
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
    if (b.box) on_mail(b, who, write);
    if (write) {
      if (a.races_with_write(b)) report("shared memory: race of two writes");
      if (a.races_with_read(b)) report("shared memory: race of a write with a read");
      a.write(b);
    } else {
      if (b.writer.thread == kNobody) report("shared memory: read of bytes that nobody wrote");
      if (a.races_with_write(b)) report("shared memory: race of a read with a write");
      a.read(b);
    }
  }
  return true;
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
    if (b.box) on_mail(b, who, true);
    if (a.races_with_read(b)) report("asynchronous copy: over bytes that another thread may still read");
    if (a.races_with_write(b)) report("asynchronous copy: over bytes that another thread writes");
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
