// What every byte remembers, and the rules that its next access must keep.
#include <string.h>

#include <algorithm>
#include <map>

#include "simt.h"

namespace qe_emu {

alignas(128) unsigned char shared_memory[kSharedBytes];

namespace {

constexpr int kNobody = -1, kMany = -2;

struct SharedByte {
  int writer = kNobody, reader = kNobody, copier = kNobody;
  uint32_t write_epoch = 0, read_epoch = 0;
  bool written = false;
};

struct Buffer {
  const char* p;
  size_t bytes;
  bool writable;
  std::string name;
  std::vector<uint8_t> written;  // over the life of the buffer
  std::vector<int64_t> writer;   // in this launch: block and thread
  std::vector<uint32_t> epoch;   // of the writer's block, when it wrote
};

// Of the blocks of this launch: until which epoch what they wrote was fenced off.
using Released = std::map<int64_t, uint32_t>;
std::map<const void*, Released> counted;  // what each counter's arrivals had fenced off
std::map<int64_t, uint32_t> fenced;
Released seen, acquired;  // by the running block: at a counter, and after its next fence

std::vector<SharedByte> shared_bytes(kSharedBytes);
std::vector<Buffer> buffers;
std::set<std::string> errors;
size_t shared_limit = 0;
uint32_t epoch = 1;

int64_t whoami() { return (static_cast<int64_t>(now.block_y) << 40) | (static_cast<int64_t>(now.block_x) << 12) | now.thread; }
int64_t block_of(int64_t who) { return who >> 12; }

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

void shadow_start_block() {
  ++epoch;
  seen.clear(), acquired.clear();
  std::fill(shared_bytes.begin(), shared_bytes.begin() + static_cast<long>(shared_limit), SharedByte{});
  memset(shared_memory, 0xA5, shared_limit);
}

void shadow_next_epoch() { ++epoch; }

void shadow_count(const void* counter) {
  for (const auto& [block, until] : counted[counter]) seen[block] = until;
  const int64_t own = block_of(whoami());
  if (fenced.count(own)) counted[counter][own] = fenced[own];
}

// What the block wrote before its last barrier; and what its counter showed can be read from now on.
void shadow_fence() {
  fenced[block_of(whoami())] = epoch;
  for (const auto& [block, until] : seen) acquired[block] = until;
}

bool shadow_shared(size_t at, size_t bytes, bool write, int thread) {
  if (at + bytes > shared_limit) return report("shared memory: access out of bounds"), false;
  for (size_t i = at; i < at + bytes; ++i) {
    SharedByte& b = shared_bytes[i];
    if (b.copier != kNobody) report("shared memory: access to bytes that an asynchronous copy still owns");
    const bool written_now = b.write_epoch == epoch && b.writer != kNobody && b.writer != thread;
    const bool read_now = b.read_epoch == epoch && b.reader != kNobody && b.reader != thread;
    if (write) {
      if (written_now) report("shared memory: race of two writes");
      if (read_now) report("shared memory: race of a write with a read");
      b.writer = thread, b.write_epoch = epoch, b.written = true;
    } else {
      if (!b.written) report("shared memory: read of bytes that nobody wrote");
      if (written_now) report("shared memory: race of a read with a write");
      b.reader = b.read_epoch == epoch && b.reader != thread ? kMany : thread;
      b.read_epoch = epoch;
    }
  }
  return true;
}

bool shadow_issue_copy(const PendingCopy& copy, int thread) {
  const size_t at = static_cast<size_t>(static_cast<unsigned char*>(copy.to) - shared_memory);
  if (!in_shared(copy.to) || at + 16 > shared_limit) return report("asynchronous copy: target out of bounds"), false;
  if (reinterpret_cast<uintptr_t>(copy.to) % 16 || reinterpret_cast<uintptr_t>(copy.from) % 16)
    return report("asynchronous copy: misaligned"), false;
  for (size_t i = at; i < at + 16; ++i) {
    SharedByte& b = shared_bytes[i];
    if (b.copier != kNobody) report("asynchronous copy: over bytes of another one in flight");
    if (b.read_epoch == epoch && b.reader != kNobody && b.reader != thread)
      report("asynchronous copy: over bytes that another thread may still read");
    if (b.write_epoch == epoch && b.writer != kNobody && b.writer != thread)
      report("asynchronous copy: over bytes that another thread writes");
    b.copier = thread;
  }
  return shadow_global(copy.from, 16, false);
}

void shadow_land_copy(const PendingCopy& copy, int thread) {
  const size_t at = static_cast<size_t>(static_cast<unsigned char*>(copy.to) - shared_memory);
  for (size_t i = at; i < at + 16; ++i) shared_bytes[i].copier = kNobody;
  shadow_shared(at, 16, true, thread);
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
      b->epoch[i] = epoch;
      b->written[i] = 1;
    } else {
      if (!b->written[i]) report("global memory: read of bytes of " + b->name + " that nobody wrote");
      if (writer == kNobody || block_of(writer) == block_of(whoami())) continue;
      const auto until = acquired.find(block_of(writer));
      if (!fresh || until == acquired.end() || b->epoch[i] >= until->second)
        report("global memory: read of " + b->name + " that another block writes in the same launch");
    }
  }
  return true;
}

void add_buffer(const void* p, size_t bytes, bool writable, const char* name, bool zeroed) {
  const size_t tracked = writable ? bytes : 0;
  buffers.push_back({static_cast<const char*>(p), bytes, writable, name, std::vector<uint8_t>(tracked, zeroed),
                     std::vector<int64_t>(tracked, kNobody), std::vector<uint32_t>(tracked, 0)});
}

void clear_buffers() { buffers.clear(); }

}  // namespace qe_emu
