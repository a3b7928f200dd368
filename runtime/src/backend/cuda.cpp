// NVIDIA's driver through its C interface, loaded with dlopen.

#include "backend/cuda.h"

#include <dlfcn.h>

#include "base/error.h"

namespace qe_edge {
namespace {

constexpr int kOutOfMemory = 2;        // CUDA_ERROR_OUT_OF_MEMORY
constexpr unsigned kNonBlocking = 1;   // CU_STREAM_NON_BLOCKING
constexpr char kLibrary[] = "libcuda.so.1";

Error NoGpu(const std::string& reason) {
  return Error(QE_ERROR_TARGET, "These engines need an NVIDIA GPU, and " + reason + ".",
               "Run them on such a machine, or give the output folder of 'qe-edge export' here.");
}

uint64_t Address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

}  // namespace

// The functions of cuda.h that are called, with the types that they have there: CUdeviceptr is 64 bits wide, handles are
// pointers, and a CUresult is an int. The library stays loaded: it has threads and statics of its own.
struct Gpu::Driver {
  int (*init)(unsigned) = nullptr;
  int (*get_device)(int*, int) = nullptr;
  int (*retain)(void**, int) = nullptr;
  int (*release)(int) = nullptr;
  int (*push)(void*) = nullptr;
  int (*pop)(void**) = nullptr;
  int (*create_stream)(void**, unsigned) = nullptr;
  int (*destroy_stream)(void*) = nullptr;
  int (*context_of_stream)(void*, void**) = nullptr;
  int (*synchronize)(void*) = nullptr;
  int (*allocate)(uint64_t*, size_t) = nullptr;
  int (*free)(uint64_t) = nullptr;
  int (*clear)(uint64_t, unsigned char, size_t, void*) = nullptr;
  int (*upload)(uint64_t, const void*, size_t, void*) = nullptr;
  int (*download)(void*, uint64_t, size_t, void*) = nullptr;

  Driver() {
    void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) throw NoGpu("the NVIDIA driver is not installed");
    Find(library, "cuInit", init);
    Find(library, "cuDeviceGet", get_device);
    Find(library, "cuDevicePrimaryCtxRetain", retain);
    Find(library, "cuDevicePrimaryCtxRelease_v2", release);
    Find(library, "cuCtxPushCurrent_v2", push);
    Find(library, "cuCtxPopCurrent_v2", pop);
    Find(library, "cuStreamCreate", create_stream);
    Find(library, "cuStreamDestroy_v2", destroy_stream);
    Find(library, "cuStreamGetCtx", context_of_stream);
    Find(library, "cuStreamSynchronize", synchronize);
    Find(library, "cuMemAlloc_v2", allocate);
    Find(library, "cuMemFree_v2", free);
    Find(library, "cuMemsetD8Async", clear);
    Find(library, "cuMemcpyHtoDAsync_v2", upload);
    Find(library, "cuMemcpyDtoHAsync_v2", download);
  }

  template <typename Function>
  static void Find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr) {
      throw Error(QE_ERROR_TARGET, std::string("The NVIDIA driver is too old: it has no ") + name + ".",
                  "Install that of CUDA 12 or later.");
    }
  }
};

Gpu::Gpu(void* stream) : driver_(std::make_unique<const Driver>()) {
  if (driver_->init(0) != 0 || driver_->get_device(&device_, 0) != 0) throw NoGpu("the NVIDIA driver finds none");
  if (stream != nullptr) {
    if (driver_->context_of_stream(stream, &context_) != 0 || context_ == nullptr) {
      throw Error(QE_ERROR_TARGET, "The NVIDIA driver does not know the CUDA stream that was given.",
                  "Give a CUstream that lives as long as the model, or none.");
    }
    stream_ = stream;
    return;
  }
  Check(driver_->retain(&context_, device_), "cuDevicePrimaryCtxRetain");
  own_ = true;
  void* popped = nullptr;
  int result = driver_->push(context_);
  if (result == 0) {
    result = driver_->create_stream(&stream_, kNonBlocking);
    driver_->pop(&popped);
  }
  if (result != 0) driver_->release(device_);
  Check(result, "cuStreamCreate");
}

Gpu::~Gpu() {
  if (!own_) return;
  void* popped = nullptr;
  if (driver_->push(context_) == 0) {
    driver_->destroy_stream(stream_);
    driver_->pop(&popped);
  }
  driver_->release(device_);
}

Gpu::Turn::Turn(const Gpu& gpu) : gpu_(gpu), lock_(gpu.mutex_) { gpu_.Check(gpu_.driver_->push(gpu_.context_), "cuCtxPushCurrent"); }

Gpu::Turn::~Turn() {
  gpu_.driver_->synchronize(gpu_.stream_);
  void* popped = nullptr;
  gpu_.driver_->pop(&popped);
}

std::shared_ptr<void> Gpu::Allocate(size_t bytes) const {
  uint64_t address = 0;
  Check(driver_->allocate(&address, bytes == 0 ? 1 : bytes), "cuMemAlloc");
  const auto free = [gpu = shared_from_this(), address](void*) { gpu->Free(address); };
  return std::shared_ptr<void>(reinterpret_cast<void*>(static_cast<uintptr_t>(address)), free);
}

// A free waits for what is queued, whichever thread calls it.
void Gpu::Free(uint64_t address) const noexcept {
  if (driver_->push(context_) != 0) return;  // the context is gone, and the memory with it
  driver_->free(address);
  void* popped = nullptr;
  driver_->pop(&popped);
}

void Gpu::Clear(void* device, size_t bytes) const {
  if (bytes > 0) Check(driver_->clear(Address(device), 0, bytes, stream_), "cuMemsetD8Async");
}

void Gpu::Upload(void* device, const void* host, size_t bytes) const {
  if (bytes > 0) Check(driver_->upload(Address(device), host, bytes, stream_), "cuMemcpyHtoDAsync");
}

void Gpu::Download(void* host, const void* device, size_t bytes) const {
  if (bytes > 0) Check(driver_->download(host, Address(device), bytes, stream_), "cuMemcpyDtoHAsync");
}

void Gpu::Wait() const { Check(driver_->synchronize(stream_), "cuStreamSynchronize"); }

void Gpu::Check(int result, const char* what) const {
  if (result == 0) return;
  if (result == kOutOfMemory) {
    throw Error(QE_ERROR_RESOURCE, "The GPU's memory is full.", "Use smaller pictures, or close other programs.");
  }
  throw Error(QE_ERROR_TARGET, std::string("The NVIDIA driver failed in ") + what + " with code " + std::to_string(result) + ".",
              "Look the code up in CUDA's list of CUresult, and see 'qe-edge doctor'.");
}

}  // namespace qe_edge
