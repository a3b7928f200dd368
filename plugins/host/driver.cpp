#include "driver.h"

#include "self_test.h"

#include <dlfcn.h>

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
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
constexpr int kMaxLaunches = sizeof(QePlan::launch) / sizeof(QeLaunch);

constexpr Result kInvalidHandle = 400, kFirstCaptureError = 900, kLastCaptureError = 908;  // of CUresult

bool IsCaptureError(Result result) { return result >= kFirstCaptureError && result <= kLastCaptureError; }

constexpr char kCapturing[] =
    "A stream of this GPU is being captured, so kernels can be neither loaded nor tested. Run the engine once before it.";

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
  Result (*get_id)(Context, unsigned long long*) = nullptr;  // from CUDA 12.0 on, else null
  Result (*capture_status)(void*, int*) = nullptr;           // from CUDA 10.0 on, else null
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
    Find(library, "cuCtxGetId", get_id);
    Find(library, "cuStreamIsCapturing", capture_status);
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

const Driver& TheDriver() {
  static const Driver driver;
  return driver;
}

struct Kernel {
  Function function = nullptr;
  unsigned shared_bytes = kDefaultSharedBytes;  // that it may be launched with
};

// What one context has loaded. Its mutexes are its own, so that no context waits for another.
struct Loaded {
  explicit Loaded(unsigned long long id) : id(id) {}

  const unsigned long long id;  // of the context; 0 where the driver gives none
  std::mutex mutex;             // of `module` and `kernels`
  Module module = nullptr;
  std::map<std::string, Kernel, std::less<>> kernels;
  std::mutex test_mutex;  // of what follows; held while the self-test runs
  bool tested = false;
  const char* verdict = nullptr;
};

std::mutex contexts_mutex;  // where contexts have ids, never held during a call of the driver that waits
std::map<Context, std::shared_ptr<Loaded>>& Contexts() {
  static auto* contexts = new std::map<Context, std::shared_ptr<Loaded>>;  // threads may outlive the library's statics
  return *contexts;
}

// Whether the context that this was loaded in is the current one. A context that is made anew may have the address of
// one that was destroyed, with its modules; its id tells. Without ids the driver is asked for a kernel of the module.
bool Alive(const Driver& driver, Loaded& loaded, unsigned long long id) {
  if (loaded.id != id) return false;
  if (driver.get_id) return true;
  const std::lock_guard<std::mutex> lock(loaded.mutex);
  Function found = nullptr;
  return loaded.kernels.empty() ||
         (driver.get_function(&found, loaded.module, loaded.kernels.begin()->first.c_str()) == kSuccess &&
          found == loaded.kernels.begin()->second.function);
}

// What the current context has loaded so far; null, and the reason, without a context.
std::shared_ptr<Loaded> Current(const Driver& driver, const char*& why) {
  Context context = nullptr;
  unsigned long long id = 0;
  if (!driver.usable) {
    why = "The CUDA driver (libcuda.so.1) is missing or too old. Install the NVIDIA driver.";
  } else if (driver.get_context(&context) != kSuccess || !context ||
             (driver.get_id && driver.get_id(context, &id) != kSuccess)) {
    why = "No CUDA context is current. Call this from TensorRT, or make a context current first.";
  } else {
    const std::lock_guard<std::mutex> lock(contexts_mutex);
    std::shared_ptr<Loaded>& loaded = Contexts()[context];
    if (!loaded || !Alive(driver, *loaded, id)) loaded = std::make_shared<Loaded>(id);
    return loaded;
  }
  return nullptr;
}

// Forgets what a context had loaded, so that the next call loads again.
void Forget(const std::shared_ptr<Loaded>& loaded) {
  const std::lock_guard<std::mutex> lock(contexts_mutex);
  for (auto entry = Contexts().begin(); entry != Contexts().end(); ++entry)
    if (entry->second == loaded) return static_cast<void>(Contexts().erase(entry));
}

const char* LoadModule(const Driver& driver, Module& module) {
  int version = 0;
  if (driver.get_version(&version) != kSuccess) return "The CUDA driver does not answer. Reinstall the NVIDIA driver.";
  const bool cuda13 = version >= 13000;
  if (!cuda13 && qe_fatbin_cuda12_bytes == 0)
    return "This build has no kernels for CUDA 12. Build the plugin with QE_PTXAS12 set to the ptxas of CUDA 12.";
  const Result result = driver.load_module(&module, cuda13 ? qe_fatbin_cuda13 : qe_fatbin_cuda12);
  if (result == kSuccess) return nullptr;
  module = nullptr;
  if (IsCaptureError(result)) return kCapturing;
  return "The kernels do not load on this GPU. Use one of compute capability 8.0 or later.";
}

// The functions of a plan's kernels, loaded if they are not there yet, which no stream may be captured for.
const char* FindKernels(const Driver& driver, Loaded& loaded, const QePlan& plan, void* stream, Function* functions) {
  const std::lock_guard<std::mutex> lock(loaded.mutex);
  for (int i = 0; i < plan.count; ++i) {
    const QeLaunch& launch = plan.launch[i];
    auto entry = loaded.kernels.find(launch.kernel);
    if (entry == loaded.kernels.end() || launch.shared_bytes > entry->second.shared_bytes) {
      if (driver.Captures(stream)) return kCapturing;
      if (!loaded.module)
        if (const char* why = LoadModule(driver, loaded.module)) return why;
      Kernel kernel;
      const Result result = driver.get_function(&kernel.function, loaded.module, launch.kernel);
      if (result != kSuccess)
        return IsCaptureError(result) ? kCapturing : "A kernel is missing from the plugin. Build the plugin again.";
      if (launch.shared_bytes > kernel.shared_bytes) {
        kernel.shared_bytes = launch.shared_bytes;
        if (driver.set_attribute(kernel.function, kMaxDynamicSharedBytes, static_cast<int>(launch.shared_bytes)) !=
            kSuccess)
          return "The GPU has too little shared memory for this tile. Choose a tactic with fewer rows.";
      }
      entry = loaded.kernels.insert_or_assign(launch.kernel, kernel).first;
    }
    functions[i] = entry->second.function;
  }
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
    const Result result = driver_.allocate(&address, bytes);
    captured_ = captured_ || IsCaptureError(result);
    if (result != kSuccess) return 0;
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

  bool captured() const { return captured_; }  // whether memory was refused because of a capture

 private:
  const Driver& driver_;
  bool captured_ = false;
  std::vector<uint64_t> memory_;
};

}  // namespace

const char* SelfTestOnce() {
  const Driver& driver = TheDriver();
  const char* why = nullptr;
  const std::shared_ptr<Loaded> loaded = Current(driver, why);
  if (!loaded) return nullptr;
  const std::lock_guard<std::mutex> lock(loaded->test_mutex);
  if (loaded->tested) return loaded->verdict;
  if (driver.Captures(nullptr)) return kCapturing;
  CurrentContext device(driver);
  const char* verdict = SelfTest(device);
  // Answers stay what they are. What kept the test from an answer, such as memory, may be otherwise next time.
  loaded->tested = !verdict || verdict == kWrongResults;
  loaded->verdict = verdict;
  return device.captured() ? kCapturing : verdict;
}

void LoadAhead(const QePlan& plan) {
  const Driver& driver = TheDriver();
  const char* why = nullptr;
  const std::shared_ptr<Loaded> loaded = Current(driver, why);
  Function functions[kMaxLaunches];
  if (loaded) FindKernels(driver, *loaded, plan, nullptr, functions);
}

const char* RunPlan(const QePlan& plan, void* stream) {
  const Driver& driver = TheDriver();
  const char* why = nullptr;
  const std::shared_ptr<Loaded> loaded = Current(driver, why);
  if (!loaded) return why;
  Function functions[kMaxLaunches];
  if ((why = FindKernels(driver, *loaded, plan, stream, functions))) return why;
  for (int i = 0; i < plan.count; ++i) {
    QeLaunch launch = plan.launch[i];
    void* parameters[] = {launch.args};
    const Result result = driver.launch(functions[i], launch.grid_x, launch.grid_y, 1, launch.threads, 1, 1,
                                        launch.shared_bytes, stream, parameters, nullptr);
    if (result == kSuccess) continue;
    if (result == kInvalidHandle) Forget(loaded);
    return "A kernel launch failed. Run plugins/device_check.sh to see which.";
  }
  return nullptr;
}

}  // namespace qe
