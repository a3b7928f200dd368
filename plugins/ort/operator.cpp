#include "operator.h"

#include <limits.h>
#include <stdio.h>

#include <new>

#ifndef QE_ORT_PROVIDER  // tests compile the operator for the CPU
#define QE_ORT_PROVIDER "CUDAExecutionProvider"
#endif

namespace qe {
namespace {

constexpr uint64_t kAlignment = 256;  // of the workspace
constexpr char kNotLowered[] =
    "Attributes are missing, as in a node that was not lowered. Lower the model with qe-edge build --target cuda.";

OrtStatus* Fail(const OrtApi& api, const char* why) {
  char text[600];
  snprintf(text, sizeof text, "QELinear: %s", why);
  return api.CreateStatus(ORT_FAIL, text);
}

ONNXTensorElementDataType TypeOf(Element element) {
  switch (element) {
    case Element::kFloat16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case Element::kBFloat16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    case Element::kInt8: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
    default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
}

// Type and shape of a tensor, given back at the end.
class Description {
 public:
  Description(const OrtApi& api, const OrtValue* value) : api_(api), status_(api.GetTensorTypeAndShape(value, &info_)) {}
  ~Description() {
    if (info_) api_.ReleaseTensorTypeAndShapeInfo(info_);
    if (status_) api_.ReleaseStatus(status_);
  }
  Description(const Description&) = delete;
  Description& operator=(const Description&) = delete;

  bool Is(Element element) const {
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    return info_ && Succeeds(api_.GetTensorElementType(info_, &type)) && type == TypeOf(element);
  }
  // False when there are more than kMaxDims.
  bool Dims(int64_t* dims, size_t& count) const {
    return info_ && Succeeds(api_.GetDimensionsCount(info_, &count)) && count <= kMaxDims &&
           Succeeds(api_.GetDimensions(info_, dims, count));
  }

 private:
  bool Succeeds(OrtStatus* status) const {
    if (status) api_.ReleaseStatus(status);
    return !status;
  }

  const OrtApi& api_;
  OrtTensorTypeAndShapeInfo* info_ = nullptr;
  OrtStatus* status_;
};

OrtStatus* ReadAttributes(const OrtApi& api, const OrtKernelInfo& info, Attributes& attributes) {
  for (const NamedInteger& integer : Integers(attributes)) {
    int64_t value = 0;
    if (OrtStatus* status = api.KernelInfoGetAttribute_int64(&info, integer.name, &value)) {
      api.ReleaseStatus(status);
      return Fail(api, kNotLowered);
    }
    if (value < INT32_MIN || value > INT32_MAX)
      return Fail(api, "An attribute is not a 32-bit integer. Lower the model with qe-edge build.");
    *integer.value = static_cast<int32_t>(value);
  }
  const char* why = CheckAttributes(attributes);
  return why ? Fail(api, why) : nullptr;
}

uint64_t Address(const void* p) { return static_cast<uint64_t>(reinterpret_cast<uintptr_t>(p)); }

}  // namespace

OrtStatus* LayerNode::Make(const OrtApi& api, const OrtKernelInfo& info, void** made) {
  *made = nullptr;
  if (TheKernels().why[0]) return Fail(api, TheKernels().why);
  Attributes attributes;
  if (OrtStatus* status = ReadAttributes(api, info, attributes)) return status;
  auto* node = new (std::nothrow) LayerNode(api, attributes);
  if (!node) return Fail(api, "No memory for a layer. Free some host memory.");
  if (OrtStatus* status = node->CheckWeights(info)) {
    delete node;
    return status;
  }
  *made = node;
  return nullptr;
}

LayerNode::~LayerNode() {
  for (const auto& [stream, layer] : layers_) TheKernels().close(layer);
}

// Weights are initializers, so that their types and sizes are looked at once.
OrtStatus* LayerNode::CheckWeights(const OrtKernelInfo& info) const {
  size_t inputs = 0, outputs = 0;
  if (OrtStatus* status = api_.KernelInfo_GetInputCount(&info, &inputs)) return status;
  if (OrtStatus* status = api_.KernelInfo_GetOutputCount(&info, &outputs)) return status;
  if (inputs != static_cast<size_t>(signature_.count) || outputs != 2)
    return Fail(api_, "The node has the wrong number of inputs or outputs for its attributes. Lower the model with qe-edge build.");
  for (size_t i = 1; i < inputs; ++i) {
    int constant = 0;
    const OrtValue* value = nullptr;
    if (OrtStatus* status = api_.KernelInfoGetConstantInput_tensor(&info, i, &constant, &value)) return status;
    if (!constant || !value) return Fail(api_, "A weight is no initializer. Lower the model with qe-edge build.");
    const Description weight(api_, value);
    int64_t dims[kMaxDims];
    size_t count = 0;
    if (!weight.Is(signature_.input[i].type) || !weight.Dims(dims, count) ||
        Volume(dims, static_cast<int>(count)) != signature_.input[i].elements)
      return Fail(api_, "A weight tensor has the wrong type or size for the node's attributes. Lower the model with qe-edge build.");
  }
  return nullptr;
}

OrtStatus* LayerNode::ReadShape(const OrtKernelContext& context, QeProblem& problem, int64_t* dims, size_t& count) const {
  const OrtValue* x = nullptr;
  if (OrtStatus* status = api_.KernelContext_GetInput(&context, 0, &x)) return status;
  const Description description(api_, x);
  const bool readable = description.Is(Element::kFloat16) && description.Dims(dims, count);
  const int64_t tokens = readable ? Tokens(dims, static_cast<int>(count), problem.K) : -1;
  if (tokens < 0 || tokens > INT32_MAX)
    return Fail(api_, "x is not a float16 tensor [..., in_features] of rank 2 to 8. Export the model with the right type.");
  dims[count - 1] = problem.N;
  problem.M = static_cast<int32_t>(tokens);
  return nullptr;
}

OrtStatus* LayerNode::ReadAddresses(const OrtKernelContext& context, QeBuffers& buffers) const {
  for (int i = 0; i < signature_.count; ++i) {
    const OrtValue* value = nullptr;
    void* data = nullptr;
    if (OrtStatus* status = api_.KernelContext_GetInput(&context, static_cast<size_t>(i), &value)) return status;
    if (OrtStatus* status = api_.GetTensorMutableData(const_cast<OrtValue*>(value), &data)) return status;
    if (!data || Address(data) % 16)
      return Fail(api_, "An input is missing or not aligned to 16 bytes. Bind buffers from a CUDA allocation.");
    AddressOf(buffers, signature_.input[i].role) = Address(data);
  }
  return nullptr;
}

OrtStatus* LayerNode::Compute(OrtKernelContext& context) {
  QeProblem problem = problem_;
  int64_t dims[kMaxDims];
  size_t count = 0, workspace_bytes = 0, counter_bytes = 0;
  if (OrtStatus* status = ReadShape(context, problem, dims, count)) return status;
  if (problem.M > 0)
    if (const char* why = TheKernels().memory(&problem, &workspace_bytes, &counter_bytes)) return Fail(api_, why);
  OrtValue *y = nullptr, *workspace = nullptr;
  const int64_t scratch = problem.M > 0 ? static_cast<int64_t>(workspace_bytes + kAlignment) : 0;
  if (OrtStatus* status = api_.KernelContext_GetOutput(&context, 0, dims, count, &y)) return status;
  if (OrtStatus* status = api_.KernelContext_GetOutput(&context, 1, &scratch, 1, &workspace)) return status;
  if (problem.M == 0) return nullptr;  // an empty batch is legal and launches nothing
  QeBuffers buffers{};
  if (OrtStatus* status = ReadAddresses(context, buffers)) return status;
  void *to = nullptr, *room = nullptr, *stream = nullptr;
  if (OrtStatus* status = api_.GetTensorMutableData(y, &to)) return status;
  if (OrtStatus* status = api_.GetTensorMutableData(workspace, &room)) return status;
  if (OrtStatus* status = api_.KernelContext_GetGPUComputeStream(&context, &stream)) return status;
  if (!to || Address(to) % 4 || !room) return Fail(api_, "The output or the workspace is missing. Free some GPU memory.");
  buffers.y = Address(to);
  buffers.workspace = (Address(room) + kAlignment - 1) / kAlignment * kAlignment;
  return Queue(problem, buffers, stream);
}

OrtStatus* LayerNode::Queue(const QeProblem& problem, const QeBuffers& buffers, void* stream) {
  const Kernels& kernels = TheKernels();
  if (!checked_) {
    if (const char* why = kernels.check()) return Fail(api_, why);
    checked_ = true;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  QeLayer* layer = nullptr;
  for (const auto& [known, its] : layers_)
    if (known == stream) layer = its;
  if (!layer) {
    const char* why = nullptr;
    if (!(layer = kernels.open(&problem, &why))) return Fail(api_, why);
    layers_.emplace_back(stream, layer);
  }
  const char* why = kernels.run(layer, &problem, &buffers, stream);
  return why ? Fail(api_, why) : nullptr;
}

namespace {

using Op = const OrtCustomOp*;

OrtCustomOp MakeOperator() {
  OrtCustomOp op{};
  op.version = ORT_API_VERSION;
  op.GetName = [](Op) { return "QELinear"; };
  op.GetExecutionProviderType = [](Op) { return QE_ORT_PROVIDER; };
  op.GetInputTypeCount = [](Op) -> size_t { return 2; };  // x, and what the layer has
  op.GetInputType = [](Op, size_t i) {
    return i ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  };
  op.GetInputCharacteristic = [](Op, size_t i) { return i ? INPUT_OUTPUT_VARIADIC : INPUT_OUTPUT_REQUIRED; };
  op.GetInputMemoryType = [](Op, size_t) { return OrtMemTypeDefault; };
  op.GetVariadicInputMinArity = [](Op) { return 2; };  // weight and columns
  op.GetVariadicInputHomogeneity = [](Op) { return 0; };
  op.GetOutputTypeCount = [](Op) -> size_t { return 2; };  // y and the workspace
  op.GetOutputType = [](Op, size_t i) {
    return i ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  };
  op.GetOutputCharacteristic = [](Op, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetVariadicOutputMinArity = [](Op) { return 0; };
  op.GetVariadicOutputHomogeneity = [](Op) { return 1; };
  op.GetStartVersion = [](Op) { return 1; };
  op.GetEndVersion = [](Op) { return INT_MAX; };
  op.CreateKernelV2 = [](Op, const OrtApi* api, const OrtKernelInfo* info, void** node) -> OrtStatusPtr {
    return LayerNode::Make(*api, *info, node);
  };
  op.KernelComputeV2 = [](void* node, OrtKernelContext* context) -> OrtStatusPtr {
    return static_cast<LayerNode*>(node)->Compute(*context);
  };
  op.KernelDestroy = [](void* node) { delete static_cast<LayerNode*>(node); };
  return op;
}

}  // namespace

const OrtCustomOp& TheOperator() {
  static const OrtCustomOp op = MakeOperator();
  return op;
}

}  // namespace qe
