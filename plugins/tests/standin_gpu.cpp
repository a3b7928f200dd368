// A libcuda.so.1 whose GPU is the source emulator: memory is the host's, kernels run when they are launched, and a graph
// runs what was captured. For the device kit; cuda.h checks every signature.
//
// STANDIN_EMULATOR is the emulator's library. With STANDIN_FAIL in the environment launches fail.
#include <cuda.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <chrono>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "../include/qe_edge/plan.h"

#undef cuEventElapsedTime

namespace {

using Clock = std::chrono::steady_clock;

struct Node {
  QeLaunch launch;
  void* to = nullptr;  // of a copy
  const void* from = nullptr;
  size_t bytes = 0;
};
struct Event {
  Clock::time_point at;
};

std::map<uint64_t, size_t> memory;
std::map<uint64_t, size_t> inputs;  // pieces of memory
bool changed = false;
std::map<std::string, bool> granted;  // kernels that may take shared memory
std::vector<Node>* captured = nullptr;

void* Symbol(const char* name) {
  static void* library = dlopen(STANDIN_EMULATOR, RTLD_NOW | RTLD_LOCAL);
  void* found = library ? dlsym(library, name) : nullptr;
  if (!found) fprintf(stderr, "the emulator has no %s\n", name), exit(3);
  return found;
}

// The emulator forgets all memory at once or none. It tells weights, which a kernel may read before the launch in front
// has ended, from memory that kernels write: what was copied into is an input here.
void Register() {
  static const auto clear = reinterpret_cast<void (*)()>(Symbol("qe_emu_clear_buffers"));
  static const auto add =
      reinterpret_cast<void (*)(const void*, size_t, int, const char*)>(Symbol("qe_emu_add_buffer"));
  if (!changed) return;
  clear();
  for (const auto& [address, bytes] : inputs) add(reinterpret_cast<void*>(address), bytes, 0, "input");
  for (const auto& [address, bytes] : memory) add(reinterpret_cast<void*>(address), bytes, 2, "memory");
  changed = false;
}

void Copy(void* to, const void* from, size_t bytes) {
  memcpy(to, from, bytes);
  const uint64_t address = reinterpret_cast<uint64_t>(to);
  const auto behind = inputs.upper_bound(address), front = behind == inputs.begin() ? behind : std::prev(behind);
  if (front != behind && front->first + front->second >= address)  // a tensor that comes in parts is one input
    front->second = std::max(front->second, address + bytes - front->first);
  else
    inputs[address] = bytes;
  changed = true;
}

CUresult Run(const Node& node) {
  if (node.to) return Copy(node.to, node.from, node.bytes), CUDA_SUCCESS;
  Register();
  static const auto launch = reinterpret_cast<int (*)(const QeLaunch*, uint64_t, int, char*, size_t)>(
      Symbol("qe_emu_launch"));
  char errors[4096];
  if (!launch(&node.launch, 1, 0, errors, sizeof errors)) return CUDA_SUCCESS;
  fprintf(stderr, "%s: %s\n", node.launch.kernel, errors);
  return CUDA_ERROR_ILLEGAL_ADDRESS;
}

CUresult Do(const Node& node) { return captured ? (captured->push_back(node), CUDA_SUCCESS) : Run(node); }

CUresult Launch(CUfunction function, unsigned x, unsigned y, unsigned z, const unsigned (&block)[3], unsigned shared,
                void** parameters, void** extra, unsigned cluster = 1) {
  const char* name = reinterpret_cast<const char*>(function);
  if (getenv("STANDIN_FAIL")) return CUDA_ERROR_LAUNCH_FAILED;
  const bool needs_cluster = !strncmp(name, "qe_cluster_", 11);
  if (z != 1 || block[1] != 1 || block[2] != 1 || !parameters || extra || (shared && !granted[name]) ||
      x % cluster || needs_cluster != (cluster > 1))
    return CUDA_ERROR_INVALID_VALUE;
  Node node{};
  snprintf(node.launch.kernel, sizeof node.launch.kernel, "%s", name);
  node.launch.grid_x = x, node.launch.grid_y = y, node.launch.threads = block[0], node.launch.shared_bytes = shared;
  node.launch.cluster = cluster;
  memcpy(node.launch.args, parameters[0], sizeof node.launch.args);
  return Do(node);
}

}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  return *context = reinterpret_cast<CUcontext>(&memory), CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuDeviceGetName(char* name, int room, CUdevice) {
  return snprintf(name, static_cast<size_t>(room), "emulated GPU"), CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return *value = 4, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return *value = 1 << 20, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return *value = 9, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return *value = 0, CUDA_SUCCESS;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
}
CUresult cuModuleLoadData(CUmodule* module, const void*) {
  return *module = reinterpret_cast<CUmodule>(&memory), CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  return *function = reinterpret_cast<CUfunction>(strdup(name)), CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
  return granted[reinterpret_cast<const char*>(function)] = true, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  return attribute == CU_FUNC_ATTRIBUTE_PTX_VERSION ? (*value = 90, CUDA_SUCCESS) : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                        unsigned bz, unsigned shared, CUstream, void** parameters, void** extra) {
  return Launch(function, gx, gy, gz, {bx, by, bz}, shared, parameters, extra);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void** parameters, void** extra) {
  unsigned cluster = 1;
  bool overlaps = false;
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    const CUlaunchAttribute& one = c->attrs[i];
    if (one.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION && cluster == 1 && one.value.clusterDim.y == 1 &&
        one.value.clusterDim.z == 1 && one.value.clusterDim.x > 1 && one.value.clusterDim.x <= 8)
      cluster = one.value.clusterDim.x;
    else if (one.id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION && !overlaps &&
             one.value.programmaticStreamSerializationAllowed == 1)
      overlaps = true;
    else
      return CUDA_ERROR_INVALID_VALUE;
  }
  return Launch(function, c->gridDimX, c->gridDimY, c->gridDimZ, {c->blockDimX, c->blockDimY, c->blockDimZ},
                c->sharedMemBytes, parameters, extra, cluster);
}
CUresult cuOccupancyMaxPotentialClusterSize(int* blocks, CUfunction, const CUlaunchConfig* c) {
  return c->numAttrs ? CUDA_ERROR_INVALID_VALUE : (*blocks = 8, CUDA_SUCCESS);
}
CUresult cuMemAlloc(CUdeviceptr* address, size_t bytes) {
  if (bytes > size_t{1} << 30) return CUDA_ERROR_OUT_OF_MEMORY;
  void* p = aligned_alloc(256, (bytes + 255) / 256 * 256);
  memory[*address = reinterpret_cast<CUdeviceptr>(memset(p, 0xAB, bytes))] = bytes;
  return changed = true, CUDA_SUCCESS;
}
CUresult cuMemFree(CUdeviceptr address) {
  const auto one = memory.find(address);
  if (one == memory.end()) return CUDA_ERROR_INVALID_VALUE;
  inputs.erase(inputs.lower_bound(address), inputs.lower_bound(address + one->second));
  memory.erase(one);
  return free(reinterpret_cast<void*>(address)), changed = true, CUDA_SUCCESS;
}
CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t bytes, CUstream) {
  return Copy(reinterpret_cast<void*>(to), from, bytes), CUDA_SUCCESS;
}
CUresult cuMemcpyDtoH(void* to, CUdeviceptr from, size_t bytes) {
  return memcpy(to, reinterpret_cast<void*>(from), bytes), CUDA_SUCCESS;
}
CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream) {
  Node node{};
  node.to = reinterpret_cast<void*>(to), node.from = reinterpret_cast<void*>(from), node.bytes = bytes;
  return Do(node);
}
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char byte, size_t bytes, CUstream) {
  return memset(reinterpret_cast<void*>(to), byte, bytes), CUDA_SUCCESS;
}
CUresult cuStreamCreate(CUstream* stream, unsigned) {
  return *stream = reinterpret_cast<CUstream>(&memory), CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream) { return captured ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS; }
CUresult cuStreamBeginCapture(CUstream, CUstreamCaptureMode) {
  return captured = new std::vector<Node>, CUDA_SUCCESS;
}
CUresult cuStreamEndCapture(CUstream, CUgraph* graph) {
  *graph = reinterpret_cast<CUgraph>(captured);
  return captured = nullptr, CUDA_SUCCESS;
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec* ready, CUgraph graph, unsigned long long) {
  return *ready = reinterpret_cast<CUgraphExec>(graph), CUDA_SUCCESS;
}
CUresult cuGraphLaunch(CUgraphExec ready, CUstream) {
  CUresult result = CUDA_SUCCESS;
  for (const Node& node : *reinterpret_cast<std::vector<Node>*>(ready))
    if (const CUresult one = Run(node)) result = one;
  return result;
}
CUresult cuGraphExecDestroy(CUgraphExec) { return CUDA_SUCCESS; }
CUresult cuGraphDestroy(CUgraph graph) { return delete reinterpret_cast<std::vector<Node>*>(graph), CUDA_SUCCESS; }
CUresult cuEventCreate(CUevent* event, unsigned) {
  return *event = reinterpret_cast<CUevent>(new Event), CUDA_SUCCESS;
}
CUresult cuEventRecord(CUevent event, CUstream) {
  return reinterpret_cast<Event*>(event)->at = Clock::now(), CUDA_SUCCESS;
}
CUresult cuEventSynchronize(CUevent) { return CUDA_SUCCESS; }
CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent stop) {
  const auto taken = reinterpret_cast<Event*>(stop)->at - reinterpret_cast<Event*>(start)->at;
  return *milliseconds = std::chrono::duration<float, std::milli>(taken).count(), CUDA_SUCCESS;
}

}  // extern "C"
