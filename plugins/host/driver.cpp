#include "driver.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <string>
#include <utility>

// payload.S: one fatbin per CUDA major version. The driver of JetPack 6 (CUDA 12) cannot read what CUDA 13 writes.
extern "C" {
extern const unsigned char qe_fatbin_cuda12[], qe_fatbin_cuda13[];
extern const unsigned long long qe_fatbin_cuda12_bytes;
}

namespace qe {
namespace {

// The part of cuda.h that is needed; its ABI has been stable since CUDA 4.
using Result = int;
using Context = void*;
using Module = void*;
using Function = void*;
constexpr Result kSuccess = 0;
constexpr int kMaxDynamicSharedBytes = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr unsigned kDefaultSharedBytes = 48 << 10;

struct Driver {
  Result (*get_version)(int*) = nullptr;
  Result (*get_context)(Context*) = nullptr;
  Result (*load_module)(Module*, const void*) = nullptr;
  Result (*get_function)(Function*, Module, const char*) = nullptr;
  Result (*set_attribute)(Function, int, int) = nullptr;
  Result (*launch)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                   void**) = nullptr;
  bool usable = false;

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) return;
    usable = Find(library, "cuDriverGetVersion", get_version) && Find(library, "cuCtxGetCurrent", get_context) &&
             Find(library, "cuModuleLoadData", load_module) && Find(library, "cuModuleGetFunction", get_function) &&
             Find(library, "cuFuncSetAttribute", set_attribute) && Find(library, "cuLaunchKernel", launch);
  }

  template <class F>
  static bool Find(void* library, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(library, name));
    return function != nullptr;
  }
};

const Driver& TheDriver() {
  static const Driver driver;
  return driver;
}

struct Loaded {
  Module module = nullptr;
  std::map<std::string, Function> functions;
};

std::mutex mutex;

const char* Load(const Driver& driver, Loaded& loaded) {
  int version = 0;
  if (driver.get_version(&version) != kSuccess) return "The CUDA driver does not answer. Reinstall the NVIDIA driver.";
  const bool cuda13 = version >= 13000;
  if (!cuda13 && qe_fatbin_cuda12_bytes == 0)
    return "This build has no kernels for CUDA 12. Build the plugin with QE_PTXAS12 set to the ptxas of CUDA 12.";
  if (driver.load_module(&loaded.module, cuda13 ? qe_fatbin_cuda13 : qe_fatbin_cuda12) != kSuccess)
    return "The kernels do not load on this GPU. Use one of compute capability 8.0 or later.";
  return nullptr;
}

const char* FindFunction(const Driver& driver, Loaded& loaded, const QeLaunch& launch, Function& function) {
  auto [entry, is_new] = loaded.functions.try_emplace(launch.kernel, nullptr);
  if (is_new && driver.get_function(&entry->second, loaded.module, launch.kernel) != kSuccess) {
    loaded.functions.erase(entry);
    return "A kernel is missing from the plugin. Build the plugin again.";
  }
  function = entry->second;
  if (launch.shared_bytes > kDefaultSharedBytes &&
      driver.set_attribute(function, kMaxDynamicSharedBytes, static_cast<int>(launch.shared_bytes)) != kSuccess)
    return "The GPU has too little shared memory for this tile. Choose a tactic with fewer rows.";
  return nullptr;
}

}  // namespace

const char* RunPlan(const QePlan& plan, void* stream) {
  const Driver& driver = TheDriver();
  if (!driver.usable) return "The CUDA driver (libcuda.so.1) is missing or too old. Install the NVIDIA driver.";
  Context context = nullptr;
  if (driver.get_context(&context) != kSuccess || !context)
    return "No CUDA context is current. Call this from TensorRT, or make a context current first.";
  const std::lock_guard<std::mutex> lock(mutex);
  static std::map<Context, Loaded> contexts;
  Loaded& loaded = contexts[context];
  if (!loaded.module)
    if (const char* why = Load(driver, loaded)) return why;
  for (int i = 0; i < plan.count; ++i) {
    QeLaunch launch = plan.launch[i];
    Function function = nullptr;
    if (const char* why = FindFunction(driver, loaded, launch, function)) return why;
    void* parameters[] = {launch.args};
    if (driver.launch(function, launch.grid_x, launch.grid_y, 1, launch.threads, 1, 1, launch.shared_bytes, stream,
                      parameters, nullptr) != kSuccess)
      return "A kernel launch failed. Run plugins/device_check.sh to see which.";
  }
  return nullptr;
}

}  // namespace qe
