// A libcuda.so.1 without a GPU, for the host code of the launcher: contexts whose addresses come back, modules that die
// with their context, streams that are captured, memory that runs out. It counts what a real driver would punish. Memory
// is real, starts as rubbish, and is filled when its stream comes to that.
//
// STANDIN_WITHOUT_IDS is a driver of CUDA 11.4: without cuCtxGetId and cuLaunchKernelEx.
#include "standin_driver.h"

#include <stdlib.h>
#include <string.h>

#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

constexpr int kSuccess = 0, kInvalidValue = 1, kNoMemory = 2, kInvalidContext = 201, kInvalidHandle = 400,
              kNotFound = 500, kOutOfResources = 701, kUnsupportedInCapture = 900, kImplicitCapture = 906;

struct Context {
  bool alive = false;
  unsigned long long id = 0;
};
struct Module {
  unsigned long long context;
};
struct Function {
  Module* module;
  std::string name;
};

struct Memory {
  unsigned long long context;
  size_t bytes;
};
struct Filling {
  uint64_t address;
  unsigned value;
  size_t words;
};

std::mutex mutex;
std::condition_variable launched;
Context contexts[4];  // what is destroyed and created again has the same address
unsigned long long last_id = 0;
std::set<Module*> modules;      // those that are alive
std::set<Function*> functions;  // likewise
std::set<void*> captured;       // streams
std::map<uint64_t, Memory> memory;
std::map<void*, std::vector<Filling>> queued;  // of each stream, not done yet
std::map<std::string, long> overlapped;
StandinCounts counts;
int allocations_to_fail = 0, launch_to_fail = 0, capability = 90, ptx_version = 90, largest_cluster = 8;
bool wait_in_load = false, wait_in_lookup = false;
thread_local Context* current = nullptr;
thread_local Context* below = nullptr;  // one that another was pushed upon
thread_local int capture_mode = 0;

bool Unsafe() {  // what may not happen while a stream is captured
  if (captured.empty() || capture_mode == 2) return false;
  ++counts.spoilt_captures;
  return true;
}

void Catch(void* stream) {  // up on what is queued
  for (const Filling& f : queued[stream])
    for (size_t i = 0; i < f.words && memory.count(f.address); ++i) reinterpret_cast<unsigned*>(f.address)[i] = f.value;
  queued.erase(stream);
}

bool Usable(uint64_t address) {
  const auto at = memory.find(address);
  if (at != memory.end() && current && at->second.context == current->id) return true;
  ++counts.dead_memory;
  return false;
}

void Wait(std::unique_lock<std::mutex>& lock, bool& wait) {  // until another thread has launched something
  if (!wait) return;
  wait = false;
  const long before = counts.launches;
  if (!launched.wait_for(lock, std::chrono::seconds(10), [&] { return counts.launches > before; })) ++counts.timeouts;
}

bool KnowsClusters() { return capability >= 90 && ptx_version >= 90; }
bool IsOfClusters(const std::string& kernel) { return !kernel.compare(0, 11, "qe_cluster_"); }

int Launch(void* function, void* stream, bool overlaps, unsigned cluster = 1) {
  auto* one = static_cast<Function*>(function);
  if (!functions.count(one) || one->module->context != current->id) return ++counts.dead_launches, kInvalidHandle;
  if (IsOfClusters(one->name) != (cluster > 1)) return kInvalidValue;
  if (launch_to_fail > 0 && --launch_to_fail == 0) return kOutOfResources;
  ++counts.launches;
  if (cluster > 1) ++counts.clusters;
  if (overlaps) ++counts.overlapped, ++overlapped[one->name];
  if (!captured.count(stream)) Catch(stream);
  launched.notify_all();
  return kSuccess;
}

}  // namespace

extern "C" {

void* standin_create(int place) {
  const std::lock_guard<std::mutex> lock(mutex);
  contexts[place] = {true, ++last_id};
  return &contexts[place];
}
void standin_destroy(void* context) {
  const std::lock_guard<std::mutex> lock(mutex);
  auto* one = static_cast<Context*>(context);
  one->alive = false;
  for (auto m = modules.begin(); m != modules.end();) m = (*m)->context == one->id ? modules.erase(m) : std::next(m);
  for (auto f = functions.begin(); f != functions.end();)
    f = modules.count((*f)->module) ? std::next(f) : functions.erase(f);
  for (auto m = memory.begin(); m != memory.end();)
    if (m->second.context == one->id) {
      free(reinterpret_cast<void*>(m->first));
      m = memory.erase(m);
      --counts.allocated;
    } else {
      ++m;
    }
}
void standin_make_current(void* context) { current = static_cast<Context*>(context); }
void standin_capture(void* stream, int begin) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (begin) captured.insert(stream);
  if (!begin) captured.erase(stream);
}
void standin_fail_allocations(int number) { allocations_to_fail = number; }
void standin_fail_launch(int number) { launch_to_fail = number; }
void standin_wait_in_load(int wait) { wait_in_load = wait != 0; }
void standin_wait_in_lookup(int wait) { wait_in_lookup = wait != 0; }
void standin_chip(int of_device, int of_code) { capability = of_device, ptx_version = of_code; }
void standin_largest_cluster(int blocks) { largest_cluster = blocks; }
long standin_overlapped(const char* kernel) {
  const std::lock_guard<std::mutex> lock(mutex);
  return overlapped[kernel];
}
StandinCounts standin_counts() {
  const std::lock_guard<std::mutex> lock(mutex);
  return counts;
}

int cuCtxGetCurrent(void** context) { return *context = current, kSuccess; }
int cuCtxPushCurrent_v2(void* context) { return below = current, current = static_cast<Context*>(context), kSuccess; }
int cuCtxPopCurrent_v2(void** context) { return *context = current, current = below, kSuccess; }
int cuCtxGetDevice(int* device) { return *device = static_cast<int>(current - contexts), kSuccess; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  const std::lock_guard<std::mutex> lock(mutex);
  ++counts.attributes;
  if (attribute != 16 && attribute != 75 && attribute != 76) return kInvalidValue;
  *value = attribute == 16 ? 100 + device : attribute == 75 ? capability / 10 : capability % 10;
  return kSuccess;
}
#ifdef STANDIN_WITHOUT_IDS
int standin_has_ids() { return 0; }
int cuDriverGetVersion(int* version) { return *version = 11040, kSuccess; }
#else
int standin_has_ids() { return 1; }
int cuDriverGetVersion(int* version) { return *version = 13000, kSuccess; }
struct LaunchConfig {  // CUlaunchConfig, once more
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  const struct {
    int id, padding;
    unsigned value[16];
  } * attributes;
  unsigned attribute_count;
};
int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** parameters, void** extra) {
  const std::lock_guard<std::mutex> lock(mutex);
  const bool plain = config->grid[2] == 1 && config->block[1] == 1 && config->block[2] == 1 && parameters && !extra;
  bool overlaps = false;
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->attribute_count; ++i) {
    const unsigned* value = config->attributes[i].value;
    if (config->attributes[i].id == 6 && !overlaps && value[0] == 1)
      overlaps = true;
    else if (config->attributes[i].id == 4 && cluster == 1 && value[0] > 1 && value[0] <= 8 && value[1] == 1 && value[2] == 1)
      cluster = value[0];
    else
      return kInvalidValue;
  }
  if (!plain || !KnowsClusters() || (!overlaps && cluster == 1) || config->grid[0] % cluster) return kInvalidValue;
  return Launch(function, config->stream, overlaps, cluster);
}
int cuOccupancyMaxPotentialClusterSize(int* blocks, void* function, const LaunchConfig* config) {
  const std::lock_guard<std::mutex> lock(mutex);
  const bool whole = config->grid[0] && config->block[0] % 32 == 0 && !config->attribute_count;
  return whole && functions.count(static_cast<Function*>(function)) ? (*blocks = largest_cluster, kSuccess) : kInvalidValue;
}
int cuCtxGetId(void* context, unsigned long long* id) {
  const std::lock_guard<std::mutex> lock(mutex);
  auto* one = static_cast<Context*>(context);
  return one->alive ? (*id = one->id, kSuccess) : kInvalidContext;
}
#endif
int cuStreamIsCapturing(void* stream, int* status) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!stream && !captured.empty()) return kImplicitCapture;
  return *status = captured.count(stream) ? 1 : 0, kSuccess;
}
int cuModuleLoadData(void** module, const void*) {
  std::unique_lock<std::mutex> lock(mutex);
  if (Unsafe()) return kUnsupportedInCapture;
  ++counts.loads;
  Wait(lock, wait_in_load);
  auto* one = new Module{current->id};
  modules.insert(one);
  return *module = one, kSuccess;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  std::unique_lock<std::mutex> lock(mutex);
  ++counts.lookups;
  auto* owner = static_cast<Module*>(module);
  if (!modules.count(owner)) return kInvalidHandle;
  for (Function* f : functions)
    if (f->module == owner && f->name == name) return *function = f, kSuccess;
  if (Unsafe()) return kUnsupportedInCapture;
  if (IsOfClusters(name) && !KnowsClusters()) return kNotFound;
  if (!IsOfClusters(name)) Wait(lock, wait_in_lookup);
  auto* one = new Function{owner, name};
  functions.insert(one);
  return *function = one, kSuccess;
}
int cuFuncGetAttribute(int* value, int attribute, void* function) {
  const std::lock_guard<std::mutex> lock(mutex);
  ++counts.attributes;
  if (!functions.count(static_cast<Function*>(function))) return kInvalidHandle;
  return attribute == 5 ? (*value = ptx_version, kSuccess) : kInvalidValue;
}
int cuFuncSetAttribute(void* function, int, int) {
  const std::lock_guard<std::mutex> lock(mutex);
  ++counts.attributes;
  return functions.count(static_cast<Function*>(function)) ? kSuccess : kInvalidHandle;
}
int cuLaunchKernel(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void* stream,
                   void**, void**) {
  const std::lock_guard<std::mutex> lock(mutex);
  return Launch(function, stream, false);
}
int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (Unsafe()) return kUnsupportedInCapture;
  if (allocations_to_fail > 0) return --allocations_to_fail, kNoMemory;
  ++counts.allocated;
  *address = reinterpret_cast<uint64_t>(memset(malloc(bytes), 0xAB, bytes));
  memory[*address] = {current->id, bytes};
  return kSuccess;
}
int cuMemFree_v2(uint64_t address) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (Unsafe()) return kUnsupportedInCapture;
  if (!Usable(address)) return kInvalidValue;
  memory.erase(address);
  free(reinterpret_cast<void*>(address));
  return --counts.allocated, kSuccess;
}
int cuMemsetD32Async(uint64_t address, unsigned value, size_t words, void* stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!Usable(address) || memory[address].bytes < 4 * words) return kInvalidValue;
  if (!captured.count(stream)) queued[stream].push_back({address, value, words});
  return kSuccess;
}
int cuThreadExchangeStreamCaptureMode(int* mode) { return std::swap(*mode, capture_mode), kSuccess; }
int cuStreamSynchronize(void* stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (Unsafe()) return kUnsupportedInCapture;
  return Catch(stream), kSuccess;
}
int cuMemcpyHtoD_v2(uint64_t, const void*, size_t) { return kSuccess; }
int cuMemcpyDtoH_v2(void* to, uint64_t, size_t bytes) { return memset(to, 0, bytes), kSuccess; }
int cuCtxSynchronize() {
  const std::lock_guard<std::mutex> lock(mutex);
  return Unsafe() ? kUnsupportedInCapture : kSuccess;
}

}  // extern "C"
