#include "contexts.h"

#include "shape.h"

// payload.S: one fatbin per CUDA major version. The driver of JetPack 6 (CUDA 12) cannot read what CUDA 13 writes.
extern "C" {
extern const unsigned char qe_fatbin_cuda12[], qe_fatbin_cuda13[];
extern const unsigned long long qe_fatbin_cuda12_bytes;
}

namespace qe {
namespace {

// Code for older chips than 9.0 cannot wait for the launch in front of it and knows no clusters, also where it runs on newer ones.
constexpr int kFirstThatOverlaps = 90;

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

}  // namespace

Loaded::Loaded(const Driver& driver, Context context, unsigned long long id) : context(context), id(id) {
  int device = 0, major = 0, minor = 0;
  if (driver.get_device(&device) != kSuccess) return;
  if (driver.device_attribute(&multiprocessors, kMultiprocessorCount, device) != kSuccess) multiprocessors = 0;
  if (driver.device_attribute(&major, kMajorVersion, device) == kSuccess &&
      driver.device_attribute(&minor, kMinorVersion, device) == kSuccess)
    capability = 10 * major + minor;
}

std::shared_ptr<Loaded> Current(const Driver& driver, const char*& why) {
  Context context = nullptr;
  unsigned long long id = 0;
  if (!driver.usable) {
    why = "The CUDA driver (libcuda.so.1) is missing or too old. Install the NVIDIA driver.";
  } else if (!CurrentId(driver, context, id)) {
    why = "No CUDA context is current. Call this from TensorRT, or make a context current first.";
  } else {
    const std::lock_guard<std::mutex> lock(contexts_mutex);
    std::shared_ptr<Loaded>& loaded = Contexts()[context];
    if (!loaded || !Alive(driver, *loaded, id)) loaded = std::make_shared<Loaded>(driver, context, id);
    return loaded;
  }
  return nullptr;
}

void Forget(const std::shared_ptr<Loaded>& loaded) {
  const std::lock_guard<std::mutex> lock(contexts_mutex);
  const auto entry = Contexts().find(loaded->context);
  if (entry != Contexts().end() && entry->second == loaded) Contexts().erase(entry);
}

// Whether blocks of the largest size fit into clusters of the largest size: a part of a GPU may have too few multiprocessors
// beside each other.
bool FitsClusters(const Driver& driver, Function kernel) {
  if (!driver.largest_cluster || driver.set_attribute(kernel, kMaxDynamicSharedBytes, kSharedBytes) != kSuccess) return false;
  const LaunchConfig config{kMostCluster, 1, 1, kClusterWarps * 32, 1, 1, kSharedBytes, nullptr, nullptr, 0};
  int blocks = 0;
  return driver.largest_cluster(&blocks, kernel, &config) == kSuccess && blocks >= kMostCluster;
}

// Code for older chips has no kernels of clusters, also where it runs on newer ones.
void AskForClusters(const Driver& driver, Loaded& loaded, void* stream) {
  const std::lock_guard<std::mutex> lock(loaded.mutex);
  if (loaded.clusters >= 0) return;
  if (!driver.overlaps || loaded.capability < kFirstThatOverlaps) {
    loaded.clusters = 0;
    return;
  }
  if (driver.Captures(stream)) return;
  Function found = nullptr;
  if (!loaded.module && LoadModule(driver, loaded.module)) return;
  const Result result = driver.get_function(&found, loaded.module, "qe_cluster_s8_c_f16");
  if (!IsCaptureError(result)) loaded.clusters = result == kSuccess && FitsClusters(driver, found);
}

const char* FindKernel(const Driver& driver, Loaded& loaded, const QeLaunch& launch, void* stream, Kernel& found) {
  const std::lock_guard<std::mutex> lock(loaded.mutex);
  const auto entry = loaded.kernels.find(launch.kernel);
  if (entry != loaded.kernels.end() && launch.shared_bytes <= entry->second.shared_bytes)
    return found = entry->second, nullptr;
  if (driver.Captures(stream)) return kCapturing;
  if (!loaded.module)
    if (const char* why = LoadModule(driver, loaded.module)) return why;
  Kernel kernel;
  const Result result = driver.get_function(&kernel.function, loaded.module, launch.kernel);
  if (result != kSuccess)
    return IsCaptureError(result) ? kCapturing : "A kernel is missing from the plugin. Build the plugin again.";
  if (launch.shared_bytes > kernel.shared_bytes) {
    kernel.shared_bytes = launch.shared_bytes;
    if (driver.set_attribute(kernel.function, kMaxDynamicSharedBytes, static_cast<int>(launch.shared_bytes)) != kSuccess)
      return "The GPU has too little shared memory for this tile. Choose a tactic with fewer rows.";
  }
  int ptx_version = 0;
  kernel.overlaps = driver.overlaps && loaded.capability >= kFirstThatOverlaps &&
                    driver.get_attribute(&ptx_version, kPtxVersion, kernel.function) == kSuccess &&
                    ptx_version >= kFirstThatOverlaps;
  loaded.kernels.insert_or_assign(launch.kernel, kernel);
  return found = kernel, nullptr;
}

}  // namespace qe
