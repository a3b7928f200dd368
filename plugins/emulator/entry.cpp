// The kernels by name, and the C interface that the Python tests call. Compiled with -fsanitize=thread.
#include <stdio.h>

#include "../include/qe_edge/plan.h"
#include "../kernels/kernels.cu"
#undef QE_PREPARE
#undef QE_DOWN_DECODE
#undef QE_DOWN_PREFILL
#undef QE_MAIN_DECODE
#undef QE_MAIN_PREFILL

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
#define QE_DOWN_PREFILL(kernel, ...) QE_ONE(kernel)
#define QE_MAIN_DECODE(kernel, ...) QE_ONE(kernel)
#define QE_MAIN_PREFILL(kernel, ...) QE_ONE(kernel)
#include "../kernels/kernel_list.h"
  return {};
}

}  // namespace

// Returns how many kinds of errors were found; `errors` gets one line each.
extern "C" int qe_emu_launch(const QeLaunch* launch, uint64_t seed, int preempt, char* errors, size_t room) {
  const auto kernel = find_kernel(*launch);
  if (!kernel) return snprintf(errors, room, "no kernel is called %s", launch->kernel), 1;
  const qe_emu::Shape shape{static_cast<int>(launch->grid_x), static_cast<int>(launch->grid_y),
                            static_cast<int>(launch->threads), launch->shared_bytes};
  const auto found = qe_emu::launch(shape, seed, preempt, kernel);
  std::string all;
  for (const std::string& e : found) all += e + "\n";
  snprintf(errors, room, "%s", all.c_str());
  return static_cast<int>(found.size());
}
extern "C" void qe_emu_add_buffer(const void* p, size_t bytes, int writable, const char* name) {
  qe_emu::add_buffer(p, bytes, writable != 0, name);
}
extern "C" void qe_emu_clear_buffers() { qe_emu::clear_buffers(); }
