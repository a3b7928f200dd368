// CUDA's driver API through dlopen: the part of cuda.h that is needed. tests/check_plugin.cpp compares it with cuda.h.
#pragma once
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>

namespace qe {

using Result = int;
using Context = void*;
using Module = void*;
using Function = void*;
constexpr Result kSuccess = 0;
constexpr Result kInvalidHandle = 400, kFirstCaptureError = 900, kLastCaptureError = 908;  // of CUresult

constexpr int kMaxDynamicSharedBytes = 8;                                    // of CUfunction_attribute
constexpr int kPtxVersion = 5;                                               // of CUfunction_attribute
constexpr int kMultiprocessorCount = 16, kMajorVersion = 75, kMinorVersion = 76;  // of CUdevice_attribute
constexpr unsigned kClusterDimension = 4, kProgrammaticStreamSerialization = 6;  // of CUlaunchAttributeID
constexpr int kRelaxedCapture = 2;                                           // of CUstreamCaptureMode

struct LaunchAttribute {  // CUlaunchAttribute
  unsigned id;
  alignas(8) unsigned value[16];  // a cluster's blocks in x, y and z; or 1 where the launch may overlap
};
static_assert(sizeof(LaunchAttribute) == 72 && offsetof(LaunchAttribute, value) == 8);

struct LaunchConfig {  // CUlaunchConfig
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  void* stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};
static_assert(sizeof(LaunchConfig) == 56 && offsetof(LaunchConfig, stream) == 32 &&
              offsetof(LaunchConfig, attributes) == 40 && offsetof(LaunchConfig, attribute_count) == 48);

inline bool IsCaptureError(Result result) { return result >= kFirstCaptureError && result <= kLastCaptureError; }

constexpr char kCapturing[] =
    "A stream of this GPU is being captured, so kernels can be neither loaded nor tested. Run the engine once before it.";

struct Driver {
  Result (*get_version)(int*) = nullptr;
  Result (*get_context)(Context*) = nullptr;
  Result (*push_context)(Context) = nullptr;
  Result (*pop_context)(Context*) = nullptr;
  Result (*get_device)(int*) = nullptr;
  Result (*device_attribute)(int*, int, int) = nullptr;
  Result (*load_module)(Module*, const void*) = nullptr;
  Result (*get_function)(Function*, Module, const char*) = nullptr;
  Result (*get_attribute)(int*, int, Function) = nullptr;
  Result (*set_attribute)(Function, int, int) = nullptr;
  Result (*launch)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                   void**) = nullptr;
  Result (*allocate)(uint64_t*, size_t) = nullptr;
  Result (*release)(uint64_t) = nullptr;
  Result (*copy_in)(uint64_t, const void*, size_t) = nullptr;
  Result (*copy_out)(void*, uint64_t, size_t) = nullptr;
  Result (*fill)(uint64_t, unsigned, size_t, void*) = nullptr;
  Result (*synchronize)() = nullptr;
  Result (*synchronize_stream)(void*) = nullptr;
  // null where the driver is older
  Result (*get_id)(Context, unsigned long long*) = nullptr;                           // CUDA 12.0
  Result (*capture_status)(void*, int*) = nullptr;                                    // CUDA 10.0
  Result (*exchange_capture_mode)(int*) = nullptr;                                    // CUDA 10.1
  Result (*launch_extended)(const LaunchConfig*, Function, void**, void**) = nullptr;  // CUDA 11.8
  Result (*largest_cluster)(int*, Function, const LaunchConfig*) = nullptr;             // CUDA 11.8
  bool usable = false;
  bool overlaps = false;  // launches may overlap, also while they are captured: CUDA 12.3

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) return;
    usable = Find(library, "cuDriverGetVersion", get_version) && Find(library, "cuCtxGetCurrent", get_context) &&
             Find(library, "cuCtxPushCurrent_v2", push_context) && Find(library, "cuCtxPopCurrent_v2", pop_context) &&
             Find(library, "cuCtxGetDevice", get_device) && Find(library, "cuDeviceGetAttribute", device_attribute) &&
             Find(library, "cuModuleLoadData", load_module) && Find(library, "cuModuleGetFunction", get_function) &&
             Find(library, "cuFuncGetAttribute", get_attribute) && Find(library, "cuFuncSetAttribute", set_attribute) &&
             Find(library, "cuLaunchKernel", launch) && Find(library, "cuMemAlloc_v2", allocate) &&
             Find(library, "cuMemFree_v2", release) && Find(library, "cuMemcpyHtoD_v2", copy_in) &&
             Find(library, "cuMemcpyDtoH_v2", copy_out) && Find(library, "cuMemsetD32Async", fill) &&
             Find(library, "cuCtxSynchronize", synchronize) && Find(library, "cuStreamSynchronize", synchronize_stream);
    Find(library, "cuCtxGetId", get_id);
    Find(library, "cuStreamIsCapturing", capture_status);
    Find(library, "cuThreadExchangeStreamCaptureMode", exchange_capture_mode);
    Find(library, "cuOccupancyMaxPotentialClusterSize", largest_cluster);
    int version = 0;
    overlaps = Find(library, "cuLaunchKernelEx", launch_extended) && usable && get_version(&version) == kSuccess &&
               version >= 12030;
  }

  template <class F>
  static bool Find(void* library, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(library, name));
    return function != nullptr;
  }

  // Whether work for this stream is recorded instead of run. Asked for the null stream, it is an error when any stream
  // that waits for the null stream is being captured; to ask leaves the capture valid. Not yet run on hardware.
  bool Captures(void* stream) const {
    int status = 0;
    return capture_status && (IsCaptureError(capture_status(stream, &status)) || status != 0);
  }
};

inline const Driver& TheDriver() {
  static const Driver driver;
  return driver;
}

}  // namespace qe
