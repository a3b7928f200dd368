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

  int64_t Count() const;
  template <typename T>
  T* As() const { return static_cast<T*>(memory.get()); }
};

using Tensors = std::map<std::string, Tensor>;

// A tensor of zeros in host memory. Throws an Error of QE_ERROR_RESOURCE where memory does not suffice.
Tensor Zeros(const std::string& dtype, std::vector<int64_t> shape);

// One graph that is ready to run. Threads may run it at once.
class Graph {
 public:
  virtual ~Graph() = default;

  // Runs on all inputs. Outputs that are in `bound` are written there, the others into new memory.
  virtual Tensors Run(const Tensors& inputs, const Tensors& bound) const = 0;
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

}  // namespace qe_edge
