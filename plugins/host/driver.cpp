#include "driver.h"

#include "self_test.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

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
  Result (*allocate)(uint64_t*, size_t) = nullptr;
  Result (*release)(uint64_t) = nullptr;
  Result (*copy_in)(uint64_t, const void*, size_t) = nullptr;
  Result (*copy_out)(void*, uint64_t, size_t) = nullptr;
  Result (*synchronize)() = nullptr;
  bool usable = false;

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) return;
    usable = Find(library, "cuDriverGetVersion", get_version) && Find(library, "cuCtxGetCurrent", get_context) &&
             Find(library, "cuModuleLoadData", load_module) && Find(library, "cuModuleGetFunction", get_function) &&
             Find(library, "cuFuncSetAttribute", set_attribute) && Find(library, "cuLaunchKernel", launch) &&
             Find(library, "cuMemAlloc_v2", allocate) && Find(library, "cuMemFree_v2", release) &&
             Find(library, "cuMemcpyHtoD_v2", copy_in) && Find(library, "cuMemcpyDtoH_v2", copy_out) &&
             Find(library, "cuCtxSynchronize", synchronize);
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

// The current context as the place of the self-test.
class CurrentContext final : public Device {
 public:
  explicit CurrentContext(const Driver& driver) : driver_(driver) {}
  ~CurrentContext() override {
    for (const uint64_t address : memory_) driver_.release(address);
  }
  uint64_t Allocate(size_t bytes, const void* contents) override {
    uint64_t address = 0;
    if (driver_.allocate(&address, bytes) != kSuccess) return 0;
    memory_.push_back(address);
    return contents && driver_.copy_in(address, contents, bytes) != kSuccess ? 0 : address;
  }
  const char* Run(const QePlan& plan) override {
    if (const char* why = RunPlan(plan, nullptr)) return why;
    return driver_.synchronize() == kSuccess
               ? nullptr
               : "A kernel of the self-test failed. Run plugins/device_check.sh and report what it prints.";
  }
  bool Read(uint64_t address, void* to, size_t bytes) override {
    return driver_.copy_out(to, address, bytes) == kSuccess;
  }

 private:
  const Driver& driver_;
  std::vector<uint64_t> memory_;
};

}  // namespace

const char* SelfTestOnce() {
  const Driver& driver = TheDriver();
  Context context = nullptr;
  if (!driver.usable || driver.get_context(&context) != kSuccess || !context) return nullptr;
  static std::mutex test_mutex;
  static std::map<Context, const char*> results;
  const std::lock_guard<std::mutex> lock(test_mutex);
  auto [entry, is_new] = results.try_emplace(context, nullptr);
  if (is_new) {
    CurrentContext device(driver);
    entry->second = SelfTest(device);
  }
  return entry->second;
}

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
