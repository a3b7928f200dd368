// TensorRT or, with QE_TENSORRT_RTX, TensorRT-RTX: engines on a GPU. Not yet run on one: it is written against the
// libraries' headers and checked against a stand-in, which tests/standin_tensorrt.cpp is.
//
// The file is compiled once for each of the two libraries that is asked for, with its own headers.

#ifdef QE_TENSORRT_RTX
#define nvinfer1 nvinfer1_rtx  // both libraries' classes have one name, and are not the same
#endif
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <optional>

#include "backend/cuda.h"
#include "backend/tensorrt.h"
#include "backend/tensorrt_log.h"
#include "base/error.h"
#include "base/files.h"
#include "base/text.h"
#include "model/folder.h"

namespace qe_edge {
namespace {

namespace trt = nvinfer1;
namespace fs = std::filesystem;

#ifdef QE_TENSORRT_RTX
constexpr char kName[] = "TensorRT-RTX", kFile[] = "libtensorrt_rtx.so.";
#else
constexpr char kName[] = "TensorRT", kFile[] = "libnvinfer.so.";
#endif
constexpr char kBuildAgain[] = "Build the model again.";
constexpr char kPlugin[] = "libqe_plugin.so", kOperator[] = "QELinear";
constexpr char kPluginRemedy[] = "Build it with 'qe-edge build-plugin', and give its path.";
constexpr size_t kPiece = 1 << 16;  // bytes that rooms of inputs and outputs are multiples of
constexpr int32_t kMostProfiles = 64;
constexpr int32_t kMostTensors = 1 << 14;

// Does something with the GPU's context if it still exists, in a destructor.
template <typename Action>
void Quietly(const Gpu& gpu, const Action& action) noexcept {
  std::optional<Gpu::Turn> turn;
  try {
    turn.emplace(gpu);
  } catch (const std::exception&) {  // the caller's context is gone
  }
  action();
}

std::string Versioned(int32_t version) {
  const int32_t major = version < 10000 ? 1000 : 10000;  // as NvInferRuntimeBase.h had it before 10, and has it
  return std::to_string(version / major) + "." + std::to_string(version % major / 100) + "." + std::to_string(version % 100);
}

std::string Written(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (const int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

trt::DataType TypeOf(const std::string& dtype) {
  if (dtype == "float32") return trt::DataType::kFLOAT;
  if (dtype == "float16") return trt::DataType::kHALF;
  if (dtype == "int64") return trt::DataType::kINT64;
  if (dtype == "uint8") return trt::DataType::kUINT8;
  throw ArtifactError("An engine has a tensor of type '" + Shown(dtype) + "', which this library does not have.", kBuildAgain);
}

// Sizes of a tensor; none for one that TensorRT does not have.
std::optional<std::vector<int64_t>> Sizes(const trt::Dims& dims) {
  if (dims.nbDims < 0 || dims.nbDims > trt::Dims::MAX_DIMS) return std::nullopt;
  return std::vector<int64_t>(dims.d, dims.d + dims.nbDims);
}

// The loaded library with its runtime. The library stays loaded: it has threads and statics of its own.
struct Library {
  Library(std::shared_ptr<const Gpu> gpu, const EngineInfo& info) : gpu(std::move(gpu)), info(info) {}
  ~Library() {
    Quietly(*gpu, [this] { delete runtime; });
  }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  const std::shared_ptr<const Gpu> gpu;
  const EngineInfo info;
  std::string version;
  trt::IRuntime* runtime = nullptr;
};

struct Range {
  std::vector<int64_t> least, most;

  bool Takes(const std::vector<int64_t>& shape) const {
    if (shape.size() != least.size()) return false;
    for (size_t axis = 0; axis < shape.size(); ++axis) {
      if (shape[axis] < least[axis] || shape[axis] > most[axis]) return false;
    }
    return true;
  }
};

using Profile = std::map<std::string, Range>;  // shapes by input

class TrtGraph : public Graph {
 public:
  TrtGraph(std::shared_ptr<const Library> library, const fs::path& folder, const GraphFile& file)
      : library_(std::move(library)), gpu_(*library_->gpu), file_(file), path_((folder / file.file).string()) {
    const Gpu::Turn turn(gpu_);
    try {
      Load(folder / file.file);
    } catch (...) {
      Unload();
      throw;
    }
  }

  ~TrtGraph() override {
    Quietly(gpu_, [this] { Unload(); });
  }
  TrtGraph(const TrtGraph&) = delete;
  TrtGraph& operator=(const TrtGraph&) = delete;

  Tensors Run(const Tensors& inputs, const Tensors& bound) const override {
    const Gpu::Turn turn(gpu_);  // its end waits, so that arrays of the caller are not read after this
    (void)Log::Only().Reason();  // of earlier calls
    SelectProfile(inputs);
    for (const TensorSpec& spec : file_.inputs) Feed(spec.name, inputs.at(spec.name));
    Tensors outputs;
    std::vector<std::pair<const Tensor*, const void*>> wanted;  // in the host's memory, and where they come from
    for (const TensorSpec& spec : file_.outputs) {
      const std::vector<int64_t> shape = OutputShape(spec);
      const auto found = bound.find(spec.name);
      Tensor& output = outputs[spec.name] = found != bound.end() ? found->second : Zeros(spec.dtype, shape);
      if (output.shape != shape || output.dtype != spec.dtype)
        throw ArtifactError("'" + path_ + "' writes '" + spec.name + "' in another size than it is kept.", kBuildAgain);
      void* address = output.on_gpu ? output.memory.get() : Room(spec.name, output.Bytes());
      if (!output.on_gpu) wanted.emplace_back(&output, address);
      if (!context_->setTensorAddress(spec.name.c_str(), address)) throw Failed();
    }
    if (!context_->enqueueV3(static_cast<cudaStream_t>(gpu_.stream()))) throw Failed();
    for (const auto& [output, address] : wanted) gpu_.Download(output->memory.get(), address, output->Bytes());
    gpu_.Wait();
    return outputs;
  }

  Tensor Kept(const std::string& dtype, const std::vector<int64_t>& shape) const override {
    const Gpu::Turn turn(gpu_);
    const size_t bytes = BytesOf(dtype, shape);
    Tensor tensor{dtype, shape, gpu_.Allocate(bytes), true};
    gpu_.Clear(tensor.memory.get(), bytes);
    return tensor;
  }

 private:
  void Load(const fs::path& path) {
    const MappedFile bytes(path);
    (void)Log::Only().Reason();
    engine_ = library_->runtime->deserializeCudaEngine(bytes.bytes().data(), bytes.bytes().size());
    if (engine_ == nullptr) {
      const EngineInfo& info = library_->info;
      throw Error(QE_ERROR_TARGET,
                  "'" + path_ + "' was built with " + kName + " " + info.version + " and cannot be loaded by " +
                      library_->version + " on this GPU" + Log::Only().Reason() + ".",
                  "Build the target '" + info.target + "' again on this machine" +
                      (info.plugin_sha256 ? ", with the plugin's library that is loaded here." : "."));
    }
    const auto count = static_cast<int32_t>(file_.inputs.size() + file_.outputs.size());
    if (count > kMostTensors || engine_->getNbIOTensors() != count)
      throw ArtifactError("'" + path_ + "' has other inputs and outputs than the manifest says.", kBuildAgain);
    for (const TensorSpec& spec : file_.inputs) CheckTensor(spec, trt::TensorIOMode::kINPUT);
    for (const TensorSpec& spec : file_.outputs) CheckTensor(spec, trt::TensorIOMode::kOUTPUT);
    ReadProfiles();
    context_ = engine_->createExecutionContext();
    if (context_ == nullptr) {
      throw Error(QE_ERROR_RESOURCE, "'" + path_ + "' does not fit into the GPU's memory" + Log::Only().Reason() + ".",
                  "Close other programs, or build for smaller sizes.");
    }
  }

  void Unload() noexcept {
    delete context_;
    delete engine_;
  }

  // Refuses a tensor that is not the manifest's: the engine would read or write beyond its memory.
  void CheckTensor(const TensorSpec& spec, trt::TensorIOMode mode) const {
    const char* name = spec.name.c_str();
    if (engine_->getTensorIOMode(name) != mode)
      throw ArtifactError("'" + path_ + "' has no such tensor as the manifest's '" + Shown(spec.name) + "'.", kBuildAgain);
    const auto found = Sizes(engine_->getTensorShape(name));
    bool fits = found && found->size() == spec.shape.size();
    for (size_t axis = 0; fits && axis < found->size(); ++axis)
      fits = (*found)[axis] == -1 || spec.shape[axis] == -1 || (*found)[axis] == spec.shape[axis];
    const bool plain = engine_->getTensorDataType(name) == TypeOf(spec.dtype) && !engine_->isShapeInferenceIO(name) &&
                       engine_->getTensorLocation(name) == trt::TensorLocation::kDEVICE &&
                       engine_->getTensorFormat(name) == trt::TensorFormat::kLINEAR;
    if (!fits || !plain) {
      throw ArtifactError("The tensor '" + Shown(spec.name) + "' of '" + path_ + "' has another type or shape than the manifest's " +
                              spec.dtype + " " + Written(spec.shape) + ".", kBuildAgain);
    }
  }

  void ReadProfiles() {
    const int32_t count = engine_->getNbOptimizationProfiles();
    if (count < 1 || count > kMostProfiles || static_cast<size_t>(count) != file_.largest.size())
      throw ArtifactError("'" + path_ + "' has other optimization profiles than the manifest says.", kBuildAgain);
    for (int32_t index = 0; index < count; ++index) {
      Profile& profile = profiles_.emplace_back();
      for (const TensorSpec& spec : file_.inputs) {
        const auto least = Sizes(engine_->getProfileShape(spec.name.c_str(), index, trt::OptProfileSelector::kMIN));
        const auto most = Sizes(engine_->getProfileShape(spec.name.c_str(), index, trt::OptProfileSelector::kMAX));
        if (!least || !most || least->size() != most->size() || most->size() != spec.shape.size())
          throw ArtifactError("A profile of '" + path_ + "' has no sizes for '" + Shown(spec.name) + "'.", kBuildAgain);
        profile[spec.name] = {*least, *most};
      }
    }
  }

  // Switches to the profile that takes all shapes; of several to that of the smallest first input.
  void SelectProfile(const Tensors& inputs) const {
    int32_t chosen = -1;
    double smallest = 0;
    std::string outside;
    for (size_t index = 0; index < profiles_.size(); ++index) {
      const std::string wrong = Outside(profiles_[index], inputs);
      double size = 1;  // numbers that no machine has are compared, not counted
      for (const int64_t axis : profiles_[index].at(file_.inputs[0].name).most) size *= static_cast<double>(axis);
      if (!wrong.empty()) {
        outside = wrong;
      } else if (chosen < 0 || size < smallest) {
        chosen = static_cast<int32_t>(index);
        smallest = size;
      }
    }
    if (chosen < 0) {
      throw InputError("The engine '" + path_ + "' was not built for inputs of this size: " + outside + ".",
                       "Use a smaller picture or prompt, or build with a larger --max-patches, --max-tiles, --max-prompt or --max-context.");
    }
    if (chosen == profile_) return;
    profile_ = -1;
    if (!context_->setOptimizationProfileAsync(chosen, static_cast<cudaStream_t>(gpu_.stream()))) throw Failed();
    profile_ = chosen;
  }

  // Says an input that a profile does not take; empty if it takes all.
  std::string Outside(const Profile& profile, const Tensors& inputs) const {
    for (const TensorSpec& spec : file_.inputs) {
      const auto found = inputs.find(spec.name);
      if (found == inputs.end() || found->second.dtype != spec.dtype) {
        throw ArtifactError("'" + path_ + "' reads '" + Shown(spec.name) + "' as " + spec.dtype + ", which this library does not have.",
                            "Run the model from Python.");
      }
      const Range& range = profile.at(spec.name);
      if (!range.Takes(found->second.shape))
        return "'" + spec.name + "' is " + Written(found->second.shape) + ", at most " + Written(range.most);
    }
    return "";
  }

  void Feed(const std::string& name, const Tensor& tensor) const {
    void* address = tensor.memory.get();
    if (!tensor.on_gpu) {
      address = Room(name, tensor.Bytes());
      gpu_.Upload(address, tensor.memory.get(), tensor.Bytes());
    }
    trt::Dims dims{};
    dims.nbDims = static_cast<int32_t>(tensor.shape.size());
    std::copy(tensor.shape.begin(), tensor.shape.end(), dims.d);  // as many as the profile has
    if (!context_->setInputShape(name.c_str(), dims) || !context_->setTensorAddress(name.c_str(), address)) throw Failed();
  }

  std::vector<int64_t> OutputShape(const TensorSpec& spec) const {
    const auto shape = Sizes(context_->getTensorShape(spec.name.c_str()));
    if (!shape || std::any_of(shape->begin(), shape->end(), [](int64_t size) { return size < 0; }))
      throw ArtifactError("The size of '" + Shown(spec.name) + "' in '" + path_ + "' depends on more than its inputs' sizes.", kBuildAgain);
    return *shape;
  }

  // An address of at least `bytes` for an input or output, taken anew only where it must grow.
  void* Room(const std::string& name, size_t bytes) const {
    auto& [size, memory] = rooms_[name];
    if (memory == nullptr || size < bytes) {
      memory = nullptr;
      const size_t whole = (bytes / kPiece + 1) * kPiece;  // the mask grows with every token
      memory = gpu_.Allocate(whole);
      size = whole;
    }
    return memory.get();
  }

  Error Failed() const {
    return Error(QE_ERROR_RESOURCE, "'" + path_ + "' failed on the GPU" + Log::Only().Reason() + ".",
                 "Use smaller pictures, or a shorter prompt, and see 'qe-edge doctor'.");
  }

  std::shared_ptr<const Library> library_;
  const Gpu& gpu_;
  GraphFile file_;
  std::string path_;
  std::vector<Profile> profiles_;
  trt::ICudaEngine* engine_ = nullptr;
  trt::IExecutionContext* context_ = nullptr;
  // the turn of a thread guards them
  mutable int32_t profile_ = -1;
  mutable std::map<std::string, std::pair<size_t, std::shared_ptr<void>>> rooms_;
};

class TensorRt : public Backend {
 public:
  explicit TensorRt(std::shared_ptr<const Library> library) : library_(std::move(library)) {}

  std::unique_ptr<Graph> Open(const fs::path& folder, const GraphFile& file, int, bool) const override {
    return std::make_unique<TrtGraph>(library_, folder, file);
  }

 private:
  std::shared_ptr<const Library> library_;
};

void* OpenLibrary(const std::string& path) {
  const std::string name = path.empty() ? kFile + std::to_string(NV_TENSORRT_MAJOR) : path;
  void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library != nullptr) return library;
  throw Error(QE_ERROR_TARGET, std::string(kName) + " cannot be loaded: " + dlerror() + ".",
              std::string("Install it in the version that built the engines, or give the path of ") + kFile +
                  std::to_string(NV_TENSORRT_MAJOR) + ".");
}

template <typename Function>
Function Named(void* library, const char* name) {
  const auto found = reinterpret_cast<Function>(dlsym(library, name));
  if (found == nullptr) {
    throw Error(QE_ERROR_TARGET, std::string("The library of ") + kName + " has no " + name + ".",
                std::string("Give the path of ") + kFile + std::to_string(NV_TENSORRT_MAJOR) + ".");
  }
  return found;
}

// Registers the plugin with TensorRT, once in a process. The plugin itself refuses weights of another layout.
void LoadPlugin(trt::IPluginRegistry* registry, const std::string& chosen, const std::string& version) {
  if (registry != nullptr && registry->getCreator(kOperator, "1", "") != nullptr) return;
  const std::string path = chosen.empty() ? kPlugin : chosen;
  std::error_code failed;
  if (!chosen.empty() && !fs::is_regular_file(chosen, failed))
    throw Error(QE_ERROR_TARGET, "There is no plugin library '" + path + "'.", kPluginRemedy);
  if (registry != nullptr && registry->loadLibrary(path.c_str()) != nullptr && registry->getCreator(kOperator, "1", "") != nullptr) return;
  throw Error(QE_ERROR_TARGET,
              std::string(kName) + " " + version + " cannot load the plugin library '" + path + "'" + Log::Only().Reason() + ".",
              kPluginRemedy);
}

std::shared_ptr<const Backend> Open(const EngineInfo& info, const GpuOptions& options) {
  const auto opened = std::make_shared<Library>(std::make_shared<const Gpu>(options.stream), info);
  void* library = OpenLibrary(options.tensorrt);
  const int32_t version = Named<int32_t (*)()>(library, "getInferLibVersion")();
  opened->version = Versioned(version);
  if (version < NV_TENSORRT_VERSION || opened->version.substr(0, opened->version.find('.')) != std::to_string(NV_TENSORRT_MAJOR)) {
    throw Error(QE_ERROR_TARGET,
                std::string("This build of libqe_edge is for ") + kName + " " + Versioned(NV_TENSORRT_VERSION) + " and later of that number, and " +
                    opened->version + " is installed.",
                "Build it with the headers of the installed version.");
  }
  const Gpu::Turn turn(*opened->gpu);
  const auto create = Named<void* (*)(void*, int32_t)>(library, "createInferRuntime_INTERNAL");
  opened->runtime = static_cast<trt::IRuntime*>(create(&Log::Only(), NV_TENSORRT_VERSION));
  if (opened->runtime == nullptr) {
    throw Error(QE_ERROR_TARGET, std::string(kName) + " " + opened->version + " does not start on this GPU" + Log::Only().Reason() + ".",
                "See 'qe-edge doctor'.");
  }
  if (info.plugin_sha256) LoadPlugin(Named<trt::IPluginRegistry* (*)()>(library, "getPluginRegistry")(), options.plugin, opened->version);
  return std::make_shared<TensorRt>(opened);
}

}  // namespace

#ifdef QE_TENSORRT_RTX
std::shared_ptr<const Backend> OpenTensorRtRtx(const EngineInfo& info, const GpuOptions& options) { return Open(info, options); }
#else
std::shared_ptr<const Backend> OpenTensorRtItself(const EngineInfo& info, const GpuOptions& options) { return Open(info, options); }
#endif

}  // namespace qe_edge
