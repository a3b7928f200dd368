// A libcuda.so.1 without a GPU: memory is the host's. It is stricter than a real driver. What is queued in a stream is
// done when the stream is waited for, so that an array that was given back too early is seen by AddressSanitizer. New
// memory is rubbish. A copy beyond an allocation, or a call without a context, ends the program.
//
// STANDIN_NO_GPU: there is none. STANDIN_MEMORY: bytes that can be had. STANDIN_FAILS: what was queued has failed.
// STANDIN_REPORT: a file for what is left at the end.

#include "standin_cuda.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace {

constexpr int kOutOfMemory = 2, kNoDevice = 100, kInvalidHandle = 400, kIllegalAddress = 700;

struct Context {
  int retained = 0;
};
struct Stream {
  Context* context;
  long done = 0;
  std::deque<std::function<void()>> queue;
};

std::recursive_mutex mutex;
Context primary;
std::map<Stream*, std::unique_ptr<Stream>> streams;
std::map<uint64_t, size_t> memory;
size_t taken = 0, peak = 0;
long done = 0;
thread_local std::vector<void*> current;

void Require(bool fine, const char* what) {
  if (fine) return;
  std::fprintf(stderr, "The stand-in's driver: %s.\n", what);
  std::abort();
}

void CheckRange(uint64_t address, size_t bytes) {
  auto after = memory.upper_bound(address);
  Require(after != memory.begin(), "an address that was never given");
  const auto& [start, size] = *--after;
  Require(address + bytes <= start + size, "a copy beyond its memory");
}

int Queue(void* stream, std::function<void()> action) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  Require(!current.empty(), "a call without a context");
  const auto found = streams.find(static_cast<Stream*>(stream));
  Require(found != streams.end(), "an unknown stream");
  found->second->queue.push_back(std::move(action));
  return 0;
}

void Finish(Stream& stream) {
  for (; !stream.queue.empty(); stream.queue.pop_front(), ++stream.done, ++done) stream.queue.front()();
}

// Of the process, at its end; before what is declared above it goes.
struct Report {
  ~Report();
} report;

Report::~Report() {
  const char* path = std::getenv("STANDIN_REPORT");
  if (path == nullptr) return;
  std::FILE* file = std::fopen(path, "w");
  if (file == nullptr) return;
  long left = 0;  // what streams that are left have done
  for (const auto& stream : streams) left += stream.second->done;
  std::fprintf(file, "{\"blocks\": %zu, \"contexts\": %d, \"streams\": %zu, \"peak\": %zu, \"done\": %ld, \"left\": %ld}\n",
               memory.size(), primary.retained, streams.size(), peak, done, left);
  std::fclose(file);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int cuInit(unsigned) { return std::getenv("STANDIN_NO_GPU") == nullptr ? 0 : kNoDevice; }

EXPORT int cuDeviceGet(int* device, int number) {
  *device = number;
  return 0;
}

EXPORT int cuDevicePrimaryCtxRetain(void** context, int) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  ++primary.retained;
  *context = &primary;
  return 0;
}

EXPORT int cuDevicePrimaryCtxRelease_v2(int) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  Require(primary.retained-- > 0, "a context is released once too often");
  return 0;
}

EXPORT int cuCtxPushCurrent_v2(void* context) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  Require(context == &primary && primary.retained > 0, "a context that is not alive");
  current.push_back(context);
  return 0;
}

EXPORT int cuCtxPopCurrent_v2(void** context) {
  Require(!current.empty(), "no context to pop");
  *context = current.back();
  current.pop_back();
  return 0;
}

EXPORT int cuStreamCreate(void** stream, unsigned) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  Require(!current.empty(), "a stream without a context");
  auto made = std::make_unique<Stream>(Stream{static_cast<Context*>(current.back()), 0, {}});
  *stream = made.get();
  streams[made.get()] = std::move(made);
  return 0;
}

EXPORT int cuStreamDestroy_v2(void* stream) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  Require(streams.erase(static_cast<Stream*>(stream)) == 1, "an unknown stream is destroyed");
  return 0;
}

EXPORT int cuStreamGetCtx(void* stream, void** context) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  const auto found = streams.find(static_cast<Stream*>(stream));
  if (found == streams.end()) return kInvalidHandle;
  *context = found->second->context;
  return 0;
}

EXPORT int cuStreamSynchronize(void* stream) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  const auto found = streams.find(static_cast<Stream*>(stream));
  Require(found != streams.end() && !current.empty(), "a wait for an unknown stream, or without a context");
  Finish(*found->second);
  return std::getenv("STANDIN_FAILS") == nullptr ? 0 : kIllegalAddress;
}

EXPORT int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  Require(!current.empty() && bytes > 0, "memory without a context, or none of it");
  const char* most = std::getenv("STANDIN_MEMORY");
  if (most != nullptr && taken + bytes > std::strtoull(most, nullptr, 10)) return kOutOfMemory;
  void* block = std::malloc(bytes);
  if (block == nullptr) return kOutOfMemory;
  std::memset(block, 0xff, bytes);  // not numbers
  *address = reinterpret_cast<uint64_t>(block);
  memory[*address] = bytes;
  taken += bytes;
  peak = taken > peak ? taken : peak;
  return 0;
}

// As the driver's, it waits for what is queued.
EXPORT int cuMemFree_v2(uint64_t address) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  for (auto& stream : streams) Finish(*stream.second);
  const auto found = memory.find(address);
  Require(found != memory.end() && !current.empty(), "memory that was never given is freed");
  taken -= found->second;
  memory.erase(found);
  std::free(reinterpret_cast<void*>(address));
  return 0;
}

EXPORT int cuMemsetD8Async(uint64_t address, unsigned char value, size_t bytes, void* stream) {
  return Queue(stream, [=] {
    CheckRange(address, bytes);
    std::memset(reinterpret_cast<void*>(address), value, bytes);
  });
}

EXPORT int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
  return Queue(stream, [=] {
    CheckRange(to, bytes);
    std::memcpy(reinterpret_cast<void*>(to), from, bytes);
  });
}

EXPORT int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
  return Queue(stream, [=] {
    CheckRange(from, bytes);
    std::memcpy(to, reinterpret_cast<void*>(from), bytes);
  });
}

EXPORT void standin_queue(void* stream, void (*action)(void*), void* argument) { Queue(stream, [=] { action(argument); }); }

EXPORT void standin_check(const void* address, size_t bytes) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  CheckRange(reinterpret_cast<uint64_t>(address), bytes);
}
