// A libcuda.so.1 without a GPU, for the host code of the launcher: contexts whose addresses come back, modules that die
// with their context, streams that are captured, memory that runs out. It counts what a real driver would punish.
//
// STANDIN_WITHOUT_IDS leaves cuCtxGetId out, as drivers before CUDA 12 do.
#include "standin_driver.h"

#include <string.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <set>
#include <string>

namespace {

constexpr int kSuccess = 0, kNoMemory = 2, kInvalidContext = 201, kInvalidHandle = 400, kUnsupportedInCapture = 900,
              kImplicitCapture = 906;

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

std::mutex mutex;
std::condition_variable launched;
Context contexts[4];  // what is destroyed and created again has the same address
unsigned long long last_id = 0;
std::set<Module*> modules;      // those that are alive
std::set<Function*> functions;  // likewise
std::set<void*> captured;       // streams
StandinCounts counts;
int allocations_to_fail = 0;
bool wait_in_load = false;
thread_local Context* current = nullptr;

bool Unsafe() {  // what may not happen while a stream is captured
  if (captured.empty()) return false;
  ++counts.spoilt_captures;
  return true;
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
}
void standin_make_current(void* context) { current = static_cast<Context*>(context); }
void standin_capture(void* stream, int begin) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (begin) captured.insert(stream);
  if (!begin) captured.erase(stream);
}
void standin_fail_allocations(int number) { allocations_to_fail = number; }
void standin_wait_in_load(int wait) { wait_in_load = wait != 0; }
StandinCounts standin_counts() {
  const std::lock_guard<std::mutex> lock(mutex);
  return counts;
}

int cuDriverGetVersion(int* version) { return *version = 13000, kSuccess; }
int cuCtxGetCurrent(void** context) { return *context = current, kSuccess; }
#ifndef STANDIN_WITHOUT_IDS
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
  if (wait_in_load) {  // until another thread has launched something
    wait_in_load = false;
    const long before = counts.launches;
    if (!launched.wait_for(lock, std::chrono::seconds(10), [&] { return counts.launches > before; })) ++counts.timeouts;
  }
  auto* one = new Module{current->id};
  modules.insert(one);
  return *module = one, kSuccess;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  const std::lock_guard<std::mutex> lock(mutex);
  auto* owner = static_cast<Module*>(module);
  if (!modules.count(owner)) return kInvalidHandle;
  for (Function* f : functions)
    if (f->module == owner && f->name == name) return *function = f, kSuccess;
  if (Unsafe()) return kUnsupportedInCapture;
  auto* one = new Function{owner, name};
  functions.insert(one);
  return *function = one, kSuccess;
}
int cuFuncSetAttribute(void* function, int, int) {
  const std::lock_guard<std::mutex> lock(mutex);
  return functions.count(static_cast<Function*>(function)) ? kSuccess : kInvalidHandle;
}
int cuLaunchKernel(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                   void**) {
  const std::lock_guard<std::mutex> lock(mutex);
  auto* one = static_cast<Function*>(function);
  if (!functions.count(one) || one->module->context != current->id) return ++counts.dead_launches, kInvalidHandle;
  ++counts.launches;
  launched.notify_all();
  return kSuccess;
}
int cuMemAlloc_v2(uint64_t* address, size_t) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (Unsafe()) return kUnsupportedInCapture;
  if (allocations_to_fail > 0) return --allocations_to_fail, kNoMemory;
  ++counts.allocated;
  return *address = 4096, kSuccess;
}
int cuMemFree_v2(uint64_t) {
  const std::lock_guard<std::mutex> lock(mutex);
  return --counts.allocated, kSuccess;
}
int cuMemcpyHtoD_v2(uint64_t, const void*, size_t) { return kSuccess; }
int cuMemcpyDtoH_v2(void* to, uint64_t, size_t bytes) { return memset(to, 0, bytes), kSuccess; }
int cuCtxSynchronize() {
  const std::lock_guard<std::mutex> lock(mutex);
  return Unsafe() ? kUnsupportedInCapture : kSuccess;
}

}  // extern "C"
