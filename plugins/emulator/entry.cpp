// The kernels by name, and the C interface that the Python tests call. Compiled with -fsanitize=thread.
#include <stdio.h>
#include <stdlib.h>

#include "../host/self_test.h"
#include "../include/qe_edge/plan.h"
#include "../kernels/kernels.cu"
#undef QE_PREPARE
#undef QE_DOWN_DECODE
#undef QE_PREPARE_DOWN
#undef QE_PREPARE_PREFILL
#undef QE_DOWN_PREFILL
#undef QE_MAIN_DECODE
#undef QE_MAIN_CLUSTER
#undef QE_MAIN_PREFILL
#undef QE_MAIN_PREFILL_WIDE

namespace {

template <class Args>
__attribute__((no_sanitize("thread"))) void run(void (*kernel)(Args), const unsigned char* bytes) {
  Args args;
  __builtin_memcpy(&args, bytes, sizeof args);
  kernel(args);
}

template <class Args>
std::function<void()> bind(void (*kernel)(Args), const QeLaunch& launch) {
  const unsigned char* bytes = launch.args;
  return [kernel, bytes]() __attribute__((no_sanitize("thread"))) { run(kernel, bytes); };
}

std::function<void()> find_kernel(const QeLaunch& launch) {
  const std::string name = launch.kernel;
#define QE_ONE(kernel) \
  if (name == #kernel) return bind(kernel, launch);
#define QE_PREPARE(kernel, ...) QE_ONE(kernel)
#define QE_DOWN_DECODE(kernel, ...) QE_ONE(kernel)
#define QE_PREPARE_DOWN(kernel, ...) QE_ONE(kernel)
#define QE_PREPARE_PREFILL(kernel, ...) QE_ONE(kernel)
#define QE_DOWN_PREFILL(kernel, ...) QE_ONE(kernel)
#define QE_MAIN_DECODE(kernel, ...) QE_ONE(kernel)
#define QE_MAIN_CLUSTER(kernel, ...) QE_ONE(kernel)
#define QE_MAIN_PREFILL(kernel, ...) QE_ONE(kernel)
#define QE_MAIN_PREFILL_WIDE(kernel, ...) QE_ONE(kernel)
#include "../kernels/kernel_list.h"
  return {};
}

}  // namespace

// Returns how many kinds of errors were found; `errors` gets one line each.
extern "C" int qe_emu_launch(const QeLaunch* launch, uint64_t seed, int preempt, char* errors, size_t room) {
  const auto kernel = find_kernel(*launch);
  if (!kernel) return snprintf(errors, room, "no kernel is called %s", launch->kernel), 1;
  const qe_emu::Shape shape{static_cast<int>(launch->grid_x), static_cast<int>(launch->grid_y),
                            static_cast<int>(launch->threads), launch->shared_bytes,
                            launch->cluster ? static_cast<int>(launch->cluster) : 1};
  const auto found = qe_emu::launch(shape, seed, preempt, kernel);
  std::string all;
  for (const std::string& e : found) all += e + "\n";
  snprintf(errors, room, "%s", all.c_str());
  return static_cast<int>(found.size());
}
// writable: 0, 1, or 2 for memory that has contents.
extern "C" void qe_emu_add_buffer(const void* p, size_t bytes, int writable, const char* name) {
  qe_emu::add_buffer(p, bytes, writable != 0, name, writable == 2);
}
extern "C" void qe_emu_clear_buffers() { qe_emu::clear_buffers(); }

namespace {

// The self-test's device, emulated.
class EmulatedDevice final : public qe::Device {
 public:
  explicit EmulatedDevice(bool clusters) : clusters_(clusters) { qe_emu::clear_buffers(); }
  ~EmulatedDevice() override {
    qe_emu::clear_buffers();
    for (void* p : memory_) free(p);
  }
  uint64_t Allocate(size_t bytes, const void* contents) override {
    void* p = aligned_alloc(256, (bytes + 255) / 256 * 256);
    memory_.push_back(p);
    if (contents) memcpy(p, contents, bytes);
    qe_emu::add_buffer(p, bytes, !contents, contents ? "an input" : "scratch");
    return reinterpret_cast<uintptr_t>(p);
  }
  uint64_t Counters(size_t bytes) override {
    void* p = aligned_alloc(256, (bytes + 255) / 256 * 256);
    memory_.push_back(p);
    memset(p, 0, bytes);
    qe_emu::add_buffer(p, bytes, true, "counters", true);
    return reinterpret_cast<uintptr_t>(p);
  }
  int Multiprocessors() override { return 132; }
  bool Clusters() override { return clusters_; }
  const char* Run(const QePlan& plan) override {
    for (int i = 0; i < plan.count; ++i)
      if (qe_emu_launch(&plan.launch[i], 1, 0, errors_, sizeof errors_)) return errors_;
    return nullptr;
  }
  bool Read(uint64_t address, void* to, size_t bytes) override {
    memcpy(to, reinterpret_cast<const void*>(static_cast<uintptr_t>(address)), bytes);
    return true;
  }

 private:
  const bool clusters_;
  std::vector<void*> memory_;
  static char errors_[4096];
};
char EmulatedDevice::errors_[4096];

}  // namespace

// Null when the self-test passes on the emulator, as a GPU with clusters or without.
extern "C" const char* qe_emu_self_test(int clusters) {
  EmulatedDevice device(clusters != 0);
  return qe::SelfTest(device);
}
