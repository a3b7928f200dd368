#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "model/manifest.h"

namespace qe_edge {

// An array where a backend computes. Copies share the memory.
struct Tensor {
  std::string dtype;  // as in the manifest
  std::vector<int64_t> shape;
  std::shared_ptr<void> memory;
  bool on_gpu = false;  // then `memory` is an address that the CPU must not read

  int64_t Count() const;
  size_t Bytes() const;
  template <typename T>
  T* As() const { return static_cast<T*>(memory.get()); }
};

using Tensors = std::map<std::string, Tensor>;

// Bytes of an array. Throws InputError if a size is negative or their product is beyond any memory.
size_t BytesOf(const std::string& dtype, const std::vector<int64_t>& shape);

// A tensor of zeros in host memory. Throws an Error of QE_ERROR_RESOURCE where memory does not suffice.
Tensor Zeros(const std::string& dtype, std::vector<int64_t> shape);

// One graph that is ready to run. Threads may run it at once.
class Graph {
 public:
  virtual ~Graph() = default;

  // Runs on all inputs. Outputs that are in `bound` are written there, the others into new memory.
  virtual Tensors Run(const Tensors& inputs, const Tensors& bound) const = 0;

  // A tensor of zeros where the graph computes, for what stays there from call to call: an input, or one of `bound`.
  virtual Tensor Kept(const std::string& dtype, const std::vector<int64_t>& shape) const { return Zeros(dtype, shape); }
};

// A library that computes graphs. A further one is a file with a class and a function like `OpenOnnxRuntime`.
class Backend {
 public:
  virtual ~Backend() = default;

  // `threads`: 0 for one per core. `frugal`: memory is given back after each operation, for inputs of any size.
  // Throws ArtifactError if the graph cannot be loaded, or its inputs and outputs are not the manifest's.
  virtual std::unique_ptr<Graph> Open(const std::filesystem::path& folder, const GraphFile& file, int threads,
                                      bool frugal) const = 0;
};

// Loads ONNX Runtime's shared library, from `path` or, where that is empty, from where the system finds it.
// Throws an Error of QE_ERROR_TARGET if it is missing or too old.
std::shared_ptr<const Backend> OpenOnnxRuntime(const std::string& path);

// Where engines for a GPU run.
struct GpuOptions {
  std::string tensorrt;    // path of TensorRT's library; empty for where the system finds it
  std::string plugin;      // path of libqe_plugin.so, for engines that need it; likewise
  void* stream = nullptr;  // a CUstream of the caller; null for one of the model's own, on the first GPU
};

// Loads the library that the engines were built for: TensorRT or TensorRT-RTX. Not yet run on a GPU.
// Throws an Error of QE_ERROR_TARGET if this build of libqe_edge cannot, or a GPU, a library or the plugin is missing.
std::shared_ptr<const Backend> OpenTensorRt(const EngineInfo& info, const GpuOptions& options);

}  // namespace qe_edge
