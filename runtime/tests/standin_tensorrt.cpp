// A libnvinfer.so without a GPU. Its engines are JSON files that name an ONNX graph, which ONNX Runtime computes when the
// stream comes to it. It refuses what TensorRT refuses: shapes outside the profile, and inputs without a shape or address.
//
//   {"graph": PATH, "inputs": [{"name", "dtype", "shape"}], "outputs": likewise, "profiles": [{NAME: [least, , most]}]}
//
// "fails" says why every run fails, "full" that no context can be had, "plugin" that the engine needs one, "hosted" and
// "packed" name a tensor in the host's memory and one of another format. STANDIN_ONNXRUNTIME is ONNX Runtime's library,
// STANDIN_TENSORRT_VERSION another version. A file that begins with "plugin" is a plugin's library.

#include "standin_tensorrt.h"  // written by unused_virtuals.py

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <map>
#include <set>
#include <sstream>

#include "backend/backend.h"
#include "base/json.h"
#include "standin_cuda.h"

namespace {

using namespace nvinfer1;
using qe_edge::Json;
using Shape = std::vector<int64_t>;

ILogger* logger = nullptr;
int plugin = 0;  // whether it is loaded

void Say(const std::string& text) { logger->log(ILogger::Severity::kERROR, text.c_str()); }

// A function of the driver's stand-in, which is loaded already.
template <typename Function>
Function Driver(const char* name) {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  return reinterpret_cast<Function>(dlsym(library, name));
}

Dims DimsOf(const Shape& shape) {
  Dims dims{};
  dims.nbDims = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), dims.d);
  return dims;
}

Dims NoDims() {
  Dims dims{};
  dims.nbDims = -1;
  return dims;
}

struct Io {
  bool input;
  std::string dtype;
  Json sizes;  // numbers, and names of what depends on a call

  Shape Static() const {
    Shape shape;
    for (const Json& size : sizes) shape.push_back(size.is_number() ? size.get<int64_t>() : -1);
    return shape;
  }
};

struct Plan {
  Json table;
  std::map<std::string, Io> tensors;
  qe_edge::GraphFile file;
  std::filesystem::path path;
  mutable std::unique_ptr<const qe_edge::Graph> graph;  // loaded for its first run; streams run one at a time

  explicit Plan(const std::string& text) : table(Json::parse(text)), path(table.at("graph").get<std::string>()) {
    file.file = path.filename().string();
    for (const char* kind : {"inputs", "outputs"}) {
      const bool input = kind[0] == 'i';
      for (const Json& entry : table.at(kind)) {
        const std::string name = entry.at("name");
        const Io io{input, entry.at("dtype"), entry.at("shape")};
        (input ? file.inputs : file.outputs).push_back({name, io.dtype, io.Static()});
        tensors.emplace(name, io);
      }
    }
  }

  qe_edge::Tensors Run(const qe_edge::Tensors& inputs) const {
    const char* library = std::getenv("STANDIN_ONNXRUNTIME");
    if (graph == nullptr) graph = qe_edge::OpenOnnxRuntime(library == nullptr ? "" : library)->Open(path.parent_path(), file, 1, false);
    return graph->Run(inputs, {});
  }

  bool Takes(size_t profile, const std::string& name, const Shape& shape) const {
    const auto least = table.at("profiles").at(profile).at(name).at(0).get<Shape>();
    const auto most = table.at("profiles").at(profile).at(name).at(2).get<Shape>();
    bool fits = shape.size() == least.size();
    for (size_t axis = 0; fits && axis < shape.size(); ++axis) fits = least[axis] <= shape[axis] && shape[axis] <= most[axis];
    return fits;
  }
};

// A run as it was queued: what TensorRT has read of its context by then.
struct Queued {
  std::shared_ptr<const Plan> plan;
  std::map<std::string, Shape> shapes;
  std::map<std::string, void*> addresses;
  decltype(&standin_check) check;

  static void Compute(void* argument) {
    const std::unique_ptr<Queued> run(static_cast<Queued*>(argument));
    qe_edge::Tensors inputs;
    for (const auto& [name, io] : run->plan->tensors) {
      if (!io.input) continue;
      qe_edge::Tensor tensor = qe_edge::Zeros(io.dtype, run->shapes.at(name));
      run->check(run->addresses.at(name), tensor.Bytes());
      std::memcpy(tensor.memory.get(), run->addresses.at(name), tensor.Bytes());
      const auto* halves = tensor.As<uint16_t>();
      if (tensor.dtype == "float16" && std::find(halves, halves + tensor.Count(), 0xffff) != halves + tensor.Count()) {
        std::fprintf(stderr, "The stand-in reads memory that was never written: %s.\n", name.c_str());
        std::abort();
      }
      inputs.emplace(name, std::move(tensor));
    }
    for (const auto& [name, tensor] : run->plan->Run(inputs)) {
      run->check(run->addresses.at(name), tensor.Bytes());
      std::memcpy(run->addresses.at(name), tensor.memory.get(), tensor.Bytes());
    }
  }
};

struct ContextWork : standin::UnusedVExecutionContext {
  explicit ContextWork(std::shared_ptr<const Plan> plan) : plan(std::move(plan)) {}

  bool setOptimizationProfileAsync(int32_t index, cudaStream_t) noexcept override {
    if (index < 0 || static_cast<size_t>(index) >= plan->table.at("profiles").size()) return false;
    profile = static_cast<size_t>(index);
    shapes.clear();
    return true;
  }

  bool setInputShape(const char* name, const Dims& dims) noexcept override {
    const Shape shape(dims.d, dims.d + dims.nbDims);
    if (!plan->Takes(profile, name, shape)) return false;
    shapes[name] = shape;
    return true;
  }

  bool setTensorAddress(const char* name, void* address) noexcept override {
    addresses[name] = address;
    return plan->tensors.count(name) == 1 && address != nullptr;
  }

  // A size that has a name is that of an input with this name; -1 if none has it.
  Dims getTensorShape(const char* name) const noexcept override {
    std::map<std::string, int64_t> known;
    for (const auto& [input, shape] : shapes) {
      const Json& sizes = plan->tensors.at(input).sizes;
      for (size_t axis = 0; axis < shape.size(); ++axis) {
        if (sizes[axis].is_string()) known[sizes[axis]] = shape[axis];
      }
    }
    Shape shape;
    for (const Json& size : plan->tensors.at(name).sizes) {
      if (size.is_number()) shape.push_back(size);
      else shape.push_back(known.count(size) == 1 ? known.at(size) : -1);
    }
    return DimsOf(shape);
  }

  bool enqueueV3(cudaStream_t stream) noexcept override {
    if (plan->table.contains("fails")) {
      Say(plan->table.at("fails").get<std::string>());
      return false;
    }
    for (const auto& [name, io] : plan->tensors) {
      if (addresses.count(name) == 0 || (io.input && shapes.count(name) == 0)) {
        Say("'" + name + "' has no address or no shape.");
        return false;
      }
    }
    auto* run = new Queued{plan, shapes, addresses, Driver<decltype(&standin_check)>("standin_check")};
    Driver<decltype(&standin_queue)>("standin_queue")(stream, Queued::Compute, run);
    return true;
  }

  std::shared_ptr<const Plan> plan;
  size_t profile = 0;
  std::map<std::string, Shape> shapes;
  std::map<std::string, void*> addresses;
};

struct Context : IExecutionContext {
  explicit Context(std::shared_ptr<const Plan> plan) : work(std::move(plan)) { mImpl = &work; }
  ContextWork work;
};

struct EngineWork : standin::UnusedVCudaEngine {
  explicit EngineWork(std::shared_ptr<const Plan> plan) : plan(std::move(plan)) {}

  const Io* Found(const char* name) const {
    const auto found = plan->tensors.find(name);
    return found == plan->tensors.end() ? nullptr : &found->second;
  }

  IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy) noexcept override {
    return plan->table.contains("full") ? nullptr : new Context(plan);
  }
  int32_t getNbOptimizationProfiles() const noexcept override { return static_cast<int32_t>(plan->table.at("profiles").size()); }
  int32_t getNbIOTensors() const noexcept override { return static_cast<int32_t>(plan->tensors.size()); }
  Dims getTensorShape(const char* name) const noexcept override { return Found(name) == nullptr ? NoDims() : DimsOf(Found(name)->Static()); }
  bool isShapeInferenceIO(const char*) const noexcept override { return false; }

  DataType getTensorDataType(const char* name) const noexcept override {
    const std::string& dtype = Found(name)->dtype;
    if (dtype == "float32") return DataType::kFLOAT;
    return dtype == "float16" ? DataType::kHALF : dtype == "int64" ? DataType::kINT64 : DataType::kUINT8;
  }
  TensorLocation getTensorLocation(const char* name) const noexcept override {
    return plan->table.value("hosted", "") == name ? TensorLocation::kHOST : TensorLocation::kDEVICE;
  }
  TensorFormat getTensorFormat(const char* name) const noexcept override {
    return plan->table.value("packed", "") == name ? TensorFormat::kCHW32 : TensorFormat::kLINEAR;
  }
  TensorIOMode getTensorIOMode(const char* name) const noexcept override {
    const Io* found = Found(name);
    return found == nullptr ? TensorIOMode::kNONE : found->input ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
  }
  Dims getProfileShape(const char* name, int32_t index, OptProfileSelector select) const noexcept override {
    const Json& profile = plan->table.at("profiles").at(static_cast<size_t>(index));
    if (!profile.contains(name)) return NoDims();
    return DimsOf(profile.at(name).at(select == OptProfileSelector::kMIN ? 0 : 2).get<Shape>());
  }

  std::shared_ptr<const Plan> plan;
};

struct Engine : ICudaEngine {
  explicit Engine(std::shared_ptr<const Plan> plan) : work(std::move(plan)) { mImpl = &work; }
  EngineWork work;
};

struct RuntimeWork : standin::UnusedVRuntime {
  ICudaEngine* deserializeCudaEngine(const void* bytes, std::size_t size) noexcept override {
    try {
      auto plan = std::make_shared<const Plan>(std::string(static_cast<const char*>(bytes), size));
      if (plan->table.contains("plugin") && plugin == 0) {
        Say("Cannot find plugin: QELinear, version: 1, namespace:.");
        return nullptr;
      }
      return new Engine(std::move(plan));
    } catch (const Json::exception&) {
      Say("The engine plan file is not compatible with this version.\nSecond line.");
    }
    return nullptr;
  }
};

struct Runtime : IRuntime {
  Runtime() { mImpl = &work; }
  RuntimeWork work;
};

struct Registry : standin::UnusedIPluginRegistry {
  PluginLibraryHandle loadLibrary(const char* path) noexcept override {
    std::ifstream file(path);
    std::string word;
    if (!(file >> word) || word != "plugin") {
      Say(std::string(path) + ": invalid ELF header");
      return nullptr;
    }
    plugin = 1;
    return &plugin;
  }
  IPluginCreatorInterface* getCreator(const char* name, const char*, const char*) noexcept override {
    return plugin == 1 && std::strcmp(name, "QELinear") == 0 ? reinterpret_cast<IPluginCreatorInterface*>(&plugin) : nullptr;
  }
};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int32_t getInferLibVersion() noexcept {
  const char* other = std::getenv("STANDIN_TENSORRT_VERSION");
  return other == nullptr ? NV_TENSORRT_VERSION : std::atoi(other);
}

EXPORT void* createInferRuntime_INTERNAL(void* given, int32_t) noexcept {
  logger = static_cast<ILogger*>(given);
  if (std::getenv("STANDIN_TENSORRT_STARTS_NOT") == nullptr) return new Runtime;
  Say("CUDA initialization failure with error: 35");
  return nullptr;
}

EXPORT IPluginRegistry* getPluginRegistry() noexcept {
  static Registry registry;
  return &registry;
}
