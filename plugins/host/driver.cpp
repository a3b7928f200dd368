#include "driver.h"

#include <string.h>

#include <algorithm>

#include "self_test.h"

namespace qe {
namespace {

Result Launch(const Driver& driver, const QeLaunch& launch, const Kernel& kernel, void* stream) {
  void* parameters[] = {const_cast<unsigned char*>(launch.args)};  // the driver copies them
  LaunchAttribute attributes[2];
  unsigned count = 0;
  if (launch.overlaps && kernel.overlaps) attributes[count++] = {kProgrammaticStreamSerialization, {1}};
  if (launch.cluster > 1) attributes[count++] = {kClusterDimension, {launch.cluster, 1, 1}};
  if (!count)
    return driver.launch(kernel.function, launch.grid_x, launch.grid_y, 1, launch.threads, 1, 1, launch.shared_bytes,
                         stream, parameters, nullptr);
  const LaunchConfig config{launch.grid_x, launch.grid_y,       1,      launch.threads, 1,
                            1,             launch.shared_bytes, stream, attributes,     count};
  return driver.launch_extended(&config, kernel.function, parameters, nullptr);
}

// The current context as the place of the self-test.
class CurrentContext final : public Device {
 public:
  explicit CurrentContext(const Driver& driver) : driver_(driver) { launcher_.Enter(0, nullptr); }
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
  uint64_t Counters(size_t bytes) override { return Allocate(bytes, std::vector<unsigned char>(bytes).data()); }
  int Multiprocessors() override { return launcher_.multiprocessors(); }
  bool Clusters() override { return launcher_.clusters(); }
  const char* Run(const QePlan& plan) override {
    if (const char* why = launcher_.Run(plan, nullptr)) return why;
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
  Launcher launcher_;
  bool captured_ = false;
  std::vector<uint64_t> memory_;
};

}  // namespace

// Whether the current context is the one that this is ready for.
bool Launcher::Knows(const Driver& driver) const {
  Context context = nullptr;
  unsigned long long id = 0;
  if (!loaded_ || !CurrentId(driver, context, id) || context != loaded_->context || id != loaded_->id) return false;
  if (driver.get_id) return true;
  Function found = nullptr;
  return !kernels_.empty() && driver.get_function(&found, loaded_->module, kernels_[0].name) == kSuccess &&
         found == kernels_[0].kernel.function;
}

void Launcher::Enter(size_t counter_bytes, void* stream) {
  const Driver& driver = TheDriver();
  if (!driver.usable || !Knows(driver)) {
    std::shared_ptr<Loaded> now = Current(driver, why_);
    if (!now) return;
    if (now != loaded_) {
      Leave();
      loaded_ = std::move(now);
      ++generation_;
    }
  }
  if (loaded_->clusters < 0) AskForClusters(driver, *loaded_, stream);
  why_ = reserved_ && counter_bytes == counter_bytes_ ? nullptr : Reserve(driver, counter_bytes, stream);
}

const char* Launcher::Reserve(const Driver& driver, size_t bytes, void* stream) {
  if (bytes && driver.Captures(stream)) return kCapturing;
  if (counters_) driver.release(counters_);
  counters_ = 0;
  if (bytes) {
    uint64_t address = 0;
    const Result result = driver.allocate(&address, bytes);
    if (IsCaptureError(result)) return kCapturing;
    if (result == kSuccess) {
      // Streams of TensorRT need not wait for the null stream, so the host does.
      if (driver.fill(address, 0, bytes / 4, nullptr) == kSuccess && driver.synchronize_stream(nullptr) == kSuccess)
        counters_ = address;
      else
        driver.release(address);
    }
  }
  counter_bytes_ = bytes;
  reserved_ = true;
  unknown_ = false;
  return nullptr;
}

// Zeroes counters that a plan left half way, in the order of the stream.
const char* Launcher::Zero(const Driver& driver, void* stream) {
  if (driver.fill(counters_, 0, counter_bytes_ / 4, stream) != kSuccess)
    return "The counters of a layer could not be zeroed. Run plugins/device_check.sh to see whether the GPU works.";
  unknown_ = driver.Captures(stream);  // then the graph zeroes its own runs, and nothing has been zeroed yet
  return nullptr;
}

// Leaves the context that this is ready for, which may have been destroyed, with its memory. A context without an id is
// known to be alive only when it is the current one; otherwise it keeps the memory.
void Launcher::Leave() {
  if (counters_) {
    const Driver& driver = TheDriver();
    unsigned long long id = 0;
    const bool alive =
        driver.get_id ? driver.get_id(loaded_->context, &id) == kSuccess && id == loaded_->id : Knows(driver);
    if (alive && driver.push_context(loaded_->context) == kSuccess) {
      int mode = kRelaxedCapture;  // nothing that this thread captures uses the memory
      if (driver.exchange_capture_mode) driver.exchange_capture_mode(&mode);
      driver.release(counters_);
      if (driver.exchange_capture_mode) driver.exchange_capture_mode(&mode);
      Context popped = nullptr;
      driver.pop_context(&popped);
    }
  }
  why_ = "Nothing is ready to be launched. Call Launcher::Enter first.";
  counters_ = 0;
  counter_bytes_ = 0;
  reserved_ = unknown_ = false;
  kernels_.clear();
  loaded_.reset();
}

// A plan's launch is most often the same kernel as last time. Null when the kernel is not in the table.
const Kernel* Launcher::Find(const QeLaunch& launch, size_t place) {
  for (size_t i = 0, at = last_[place]; i < kernels_.size(); ++i, ++at) {
    if (at >= kernels_.size()) at = 0;
    if (strcmp(kernels_[at].name, launch.kernel) != 0) continue;
    last_[place] = at;
    return launch.shared_bytes <= kernels_[at].kernel.shared_bytes ? &kernels_[at].kernel : nullptr;
  }
  return nullptr;
}

// The kernels of a plan's launches; what is missing in the table is put into it.
const char* Launcher::Resolve(const Driver& driver, const QePlan& plan, void* stream, Kernel* kernels) {
  for (int i = 0; i < plan.count; ++i) {
    const QeLaunch& launch = plan.launch[i];
    if (const Kernel* known = Find(launch, static_cast<size_t>(i))) {
      kernels[i] = *known;
      continue;
    }
    Entry entry{};
    if (const char* why = FindKernel(driver, *loaded_, launch, stream, entry.kernel)) return why;
    memcpy(entry.name, launch.kernel, sizeof entry.name);
    kernels[i] = entry.kernel;
    const auto same = [&](const Entry& known) { return strcmp(known.name, entry.name) == 0; };
    const auto at = std::find_if(kernels_.begin(), kernels_.end(), same);  // with less shared memory
    if (at == kernels_.end())
      kernels_.push_back(entry);
    else
      *at = entry;
  }
  return nullptr;
}

const char* Launcher::Load(const QePlan& plan, void* stream) {
  Kernel kernels[kMaxLaunches];
  return why_ ? why_ : Resolve(TheDriver(), plan, stream, kernels);
}

const char* Launcher::Run(const QePlan& plan, void* stream) {
  if (why_) return why_;
  const Driver& driver = TheDriver();
  Kernel kernels[kMaxLaunches];
  if (const char* why = Resolve(driver, plan, stream, kernels)) return why;
  if (unknown_)
    if (const char* why = Zero(driver, stream)) return why;
  for (int i = 0; i < plan.count; ++i) {
    const Result result = Launch(driver, plan.launch[i], kernels[i], stream);
    if (result == kSuccess) continue;
    unknown_ = counters_ != 0;
    if (result == kInvalidHandle) {  // the module is gone: load it again
      Forget(loaded_);
      Leave();
    }
    return "A kernel launch failed. Run plugins/device_check.sh to see which.";
  }
  return nullptr;
}

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

}  // namespace qe
