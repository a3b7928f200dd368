// ONNX Runtime through its C interface, loaded with dlopen: the CPU's provider.

#include <dlfcn.h>
#include <onnxruntime_c_api.h>

#include <functional>

#include "backend/backend.h"
#include "base/error.h"

namespace qe_edge {
namespace {

constexpr char kExport[] = "Export the model again.";
constexpr size_t kReason = 300;  // characters of what ONNX Runtime says

// The loaded library. It stays loaded: it has threads and statics of its own.
struct Runtime {
  const OrtApi* api = nullptr;
  OrtEnv* env = nullptr;
  OrtMemoryInfo* memory = nullptr;

  ~Runtime() {
    if (memory != nullptr) api->ReleaseMemoryInfo(memory);
    if (env != nullptr) api->ReleaseEnv(env);
  }

  // What went wrong, one line; empty if nothing did.
  std::string Reason(OrtStatus* status) const {
    if (status == nullptr) return "";
    std::string text = api->GetErrorMessage(status);
    api->ReleaseStatus(status);
    text = text.substr(0, std::min(text.find('\n'), kReason));
    return text.empty() ? "unknown" : text;
  }

  void Check(OrtStatus* status, const char* what) const {
    const std::string reason = Reason(status);
    if (!reason.empty()) {
      throw Error(QE_ERROR_RESOURCE, std::string("ONNX Runtime cannot ") + what + ": " + reason + ".",
                  "Check that its version is that of constraints.txt.");
    }
  }
};

using RuntimePointer = std::shared_ptr<const Runtime>;
using Value = std::unique_ptr<OrtValue, std::function<void(OrtValue*)>>;

ONNXTensorElementDataType TypeOf(const std::string& dtype) {
  if (dtype == "float32") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  if (dtype == "float16") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  if (dtype == "int64") return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
  if (dtype == "uint8") return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  throw ArtifactError("A graph has a tensor of type '" + dtype + "', which this library does not have.", kExport);
}

std::string NameOf(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return "float32";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return "float16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return "int64";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8: return "uint8";
    default: throw ArtifactError("A graph computes a tensor of an unknown type.", kExport);
  }
}

class OrtGraph : public Graph {
 public:
  OrtGraph(RuntimePointer runtime, const std::filesystem::path& folder, const GraphFile& file, int threads, bool frugal)
      : runtime_(std::move(runtime)), file_(file) {
    const OrtApi& api = *runtime_->api;
    OrtSessionOptions* options = nullptr;
    runtime_->Check(api.CreateSessionOptions(&options), "make options");
    const std::unique_ptr<OrtSessionOptions, void (*)(OrtSessionOptions*)> held(options, api.ReleaseSessionOptions);
    runtime_->Check(api.SetSessionLogSeverityLevel(options, ORT_LOGGING_LEVEL_ERROR), "set its log");
    runtime_->Check(api.AddSessionConfigEntry(options, "session.qdq_matmulnbits_accuracy_level", "0"), "be exact");
    if (threads > 0) runtime_->Check(api.SetIntraOpNumThreads(options, threads), "set its threads");
    if (frugal) {
      runtime_->Check(api.DisableMemPattern(options), "plan no memory");
      runtime_->Check(api.DisableCpuMemArena(options), "give memory back");
    }
    const std::filesystem::path path = folder / file.file;
    const std::string reason = runtime_->Reason(api.CreateSession(runtime_->env, path.c_str(), options, &session_));
    if (!reason.empty())
      throw ArtifactError("ONNX Runtime cannot load '" + path.string() + "': " + reason + ".", kExport);
    try {
      CheckNames(file.inputs, false, path.string());
      CheckNames(file.outputs, true, path.string());
    } catch (...) {
      api.ReleaseSession(session_);
      throw;
    }
  }

  ~OrtGraph() override { runtime_->api->ReleaseSession(session_); }
  OrtGraph(const OrtGraph&) = delete;
  OrtGraph& operator=(const OrtGraph&) = delete;

  Tensors Run(const Tensors& inputs, const Tensors& bound) const override {
    std::vector<Value> held;
    std::vector<const char*> input_names, output_names;
    std::vector<const OrtValue*> fed;
    std::vector<OrtValue*> written;
    for (const TensorSpec& spec : file_.inputs) {
      const auto found = inputs.find(spec.name);
      if (found == inputs.end()) {
        throw ArtifactError("'" + file_.file + "' reads '" + spec.name + "', which this library does not have.",
                            "Run the model from Python.");
      }
      held.push_back(Wrap(found->second));
      input_names.push_back(spec.name.c_str());
      fed.push_back(held.back().get());
    }
    for (const TensorSpec& spec : file_.outputs) {
      const auto found = bound.find(spec.name);
      if (found != bound.end()) held.push_back(Wrap(found->second));
      output_names.push_back(spec.name.c_str());
      written.push_back(found != bound.end() ? held.back().get() : nullptr);
    }
    const std::string reason =
        runtime_->Reason(runtime_->api->Run(session_, nullptr, input_names.data(), fed.data(), fed.size(),
                                            output_names.data(), output_names.size(), written.data()));
    std::vector<Value> made;  // owned also where one of them cannot be read
    for (size_t index = 0; index < written.size(); ++index) {
      if (bound.count(file_.outputs[index].name) == 0 && written[index] != nullptr) made.push_back(Own(written[index]));
    }
    if (!reason.empty()) {
      throw Error(QE_ERROR_RESOURCE, "ONNX Runtime failed in '" + file_.file + "': " + reason + ".",
                  "Use fewer or smaller pictures, or a shorter prompt.");
    }
    Tensors outputs = bound;
    size_t next = 0;
    for (const TensorSpec& spec : file_.outputs) {
      if (bound.count(spec.name) == 0) outputs[spec.name] = Unwrap(std::move(made[next++]));
    }
    return outputs;
  }

 private:
  Value Own(OrtValue* value) const {
    return Value(value, [runtime = runtime_](OrtValue* held) { runtime->api->ReleaseValue(held); });
  }

  Value Wrap(const Tensor& tensor) const {
    OrtValue* value = nullptr;
    runtime_->Check(runtime_->api->CreateTensorWithDataAsOrtValue(runtime_->memory, tensor.memory.get(), tensor.Bytes(),
                                                                  tensor.shape.data(), tensor.shape.size(),
                                                                  TypeOf(tensor.dtype), &value),
                    "take a tensor");
    return Own(value);
  }

  Tensor Unwrap(Value value) const {
    const OrtApi& api = *runtime_->api;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    runtime_->Check(api.GetTensorTypeAndShape(value.get(), &info), "describe a tensor");
    const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> described(
        info, api.ReleaseTensorTypeAndShapeInfo);
    ONNXTensorElementDataType type{};
    size_t axes = 0;
    runtime_->Check(api.GetTensorElementType(info, &type), "describe a tensor");
    runtime_->Check(api.GetDimensionsCount(info, &axes), "describe a tensor");
    Tensor tensor{NameOf(type), std::vector<int64_t>(axes), nullptr};
    runtime_->Check(api.GetDimensions(info, tensor.shape.data(), axes), "describe a tensor");
    void* data = nullptr;
    runtime_->Check(api.GetTensorMutableData(value.get(), &data), "give a tensor");
    tensor.memory = std::shared_ptr<void>(data, [owner = std::make_shared<Value>(std::move(value))](void*) {});
    return tensor;
  }

  void CheckNames(const std::vector<TensorSpec>& specs, bool outputs, const std::string& path) const {
    const OrtApi& api = *runtime_->api;
    size_t count = 0;
    runtime_->Check((outputs ? api.SessionGetOutputCount : api.SessionGetInputCount)(session_, &count), "count names");
    bool same = count == specs.size();
    OrtAllocator* allocator = nullptr;
    runtime_->Check(api.GetAllocatorWithDefaultOptions(&allocator), "give an allocator");
    for (size_t index = 0; same && index < count; ++index) {
      char* name = nullptr;
      const auto get = outputs ? api.SessionGetOutputName : api.SessionGetInputName;
      runtime_->Check(get(session_, index, allocator, &name), "name a tensor");
      same = specs[index].name == name;
      (void)runtime_->Reason(api.AllocatorFree(allocator, name));
    }
    if (!same) {
      throw ArtifactError(std::string("The ") + (outputs ? "outputs" : "inputs") + " of '" + path +
                              "' are not those of the manifest.", kExport);
    }
  }

  RuntimePointer runtime_;
  GraphFile file_;
  OrtSession* session_ = nullptr;
};

class OnnxRuntime : public Backend {
 public:
  explicit OnnxRuntime(RuntimePointer runtime) : runtime_(std::move(runtime)) {}

  std::unique_ptr<Graph> Open(const std::filesystem::path& folder, const GraphFile& file, int threads,
                              bool frugal) const override {
    return std::make_unique<OrtGraph>(runtime_, folder, file, threads, frugal);
  }

 private:
  RuntimePointer runtime_;
};

void* OpenLibrary(const std::string& path) {
  if (!path.empty()) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) return library;
    throw Error(QE_ERROR_TARGET, "ONNX Runtime cannot be loaded from '" + path + "': " + dlerror() + ".",
                "Give the path of libonnxruntime.so of version 1.21 or later.");
  }
  for (const char* name : {"libonnxruntime.so.1", "libonnxruntime.so"}) {
    if (void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return library;
  }
  throw Error(QE_ERROR_TARGET, "ONNX Runtime's library is not installed.",
              "Give the path of libonnxruntime.so; Python's package onnxruntime has one in its folder 'capi'.");
}

}  // namespace

std::shared_ptr<const Backend> OpenOnnxRuntime(const std::string& path) {
  void* library = OpenLibrary(path);
  using GetBase = const OrtApiBase* (*)();
  const auto get_base = reinterpret_cast<GetBase>(dlsym(library, "OrtGetApiBase"));
  const OrtApiBase* base = get_base == nullptr ? nullptr : get_base();
  const OrtApi* api = base == nullptr ? nullptr : base->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    const std::string found = base == nullptr ? "of no known kind" : base->GetVersionString();
    throw Error(QE_ERROR_TARGET, "The library of ONNX Runtime is " + found + ", and 1.21 or later is needed.",
                "Install a later version, or give the path of one.");
  }
  auto runtime = std::make_shared<Runtime>();
  runtime->api = api;
  runtime->Check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "qe_edge", &runtime->env), "start");
  runtime->Check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &runtime->memory), "use the CPU");
  return std::make_shared<OnnxRuntime>(runtime);
}

}  // namespace qe_edge
