#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "backend/backend.h"

namespace qe_edge {

// A GPU with the one stream in which a model's work is queued, through NVIDIA's driver, which is loaded with dlopen:
// nothing of CUDA is linked, and no header of it is needed. Not yet run on a GPU.
//
// Every function but the constructor and `Free` needs a `Turn`.
class Gpu : public std::enable_shared_from_this<Gpu> {
 public:
  // `stream`: a CUstream of the caller, whose context is used; null for a new stream on the first GPU.
  // Throws an Error of QE_ERROR_TARGET if there is no driver, no GPU or no such stream.
  explicit Gpu(void* stream);
  ~Gpu();
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  // One thread at a time, with the GPU's context current in it. When it ends the stream is done, so that nothing reads
  // the thread's arrays any more, and the thread has the context that it had.
  class Turn {
   public:
    explicit Turn(const Gpu& gpu);
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    const Gpu& gpu_;
    std::lock_guard<std::mutex> lock_;
  };

  // Memory that goes back with its last copy. Throws an Error of QE_ERROR_RESOURCE if the GPU has none.
  std::shared_ptr<void> Allocate(size_t bytes) const;

  // Queued in the stream. Arrays of the host live until `Wait`, or the turn's end.
  void Clear(void* device, size_t bytes) const;
  void Upload(void* device, const void* host, size_t bytes) const;
  void Download(void* host, const void* device, size_t bytes) const;

  void Wait() const;  // until the stream is done
  void* stream() const { return stream_; }

 private:
  struct Driver;

  void Check(int result, const char* what) const;
  void Free(uint64_t address) const noexcept;

  std::unique_ptr<const Driver> driver_;
  void* context_ = nullptr;
  void* stream_ = nullptr;
  int device_ = 0;
  bool own_ = false;  // whether stream and context are given back
  mutable std::mutex mutex_;
};

}  // namespace qe_edge
