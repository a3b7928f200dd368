#include "qe_linear_plugin.h"

#include <algorithm>
#include <atomic>
#include <new>

#include "../host/token_classes.h"
#include "log.h"

namespace qe {
namespace {

using nvinfer1::DataType;

// Tactic i + 1 for TensorRT, which wants positive numbers; 0 lets the plan choose. 128 rows of 16-bit activations do not
// fit the shared memory of every chip.
constexpr QeTactic kTactics[] = {{64, 8, 0, 0}, {64, 4, 0, 0}, {64, 2, 0, 0}, {128, 8, 0, 0}};
constexpr int kTacticCount = sizeof(kTactics) / sizeof(kTactics[0]);

int32_t Fail(const char* why) {
  LogError(why);
  return -1;
}

// Dimensions as both plugins read them; a rank that TensorRT does not have becomes one that fits no tensor.
struct Shape {
  int64_t dims[nvinfer1::Dims::MAX_DIMS];
  int count;

  explicit Shape(const nvinfer1::Dims& from) : count(from.nbDims) {
    if (count < 0 || count > nvinfer1::Dims::MAX_DIMS) dims[0] = -1, count = 1;
    else std::copy_n(from.d, count, dims);
  }
};

int64_t VolumeOf(const nvinfer1::Dims& dims) {
  const Shape shape(dims);
  return Volume(shape.dims, shape.count);
}

bool IsHalf(DataType type) { return type == DataType::kHALF || type == DataType::kBF16; }

constexpr char kWrongInputs[] =
    "The node has the wrong number of inputs or outputs for its attributes. Lower the model with qe-edge build.";
constexpr char kWrongX[] =
    "x is not a float16 or bfloat16 tensor [..., in_features] of rank 2 to 8. Export the model with the right type.";

}  // namespace

nvinfer1::DataType TypeOf(Element element) {
  switch (element) {
    case Element::kFloat16: return DataType::kHALF;
    case Element::kBFloat16: return DataType::kBF16;
    case Element::kInt8: return DataType::kINT8;
    default: return DataType::kFLOAT;
  }
}

int64_t TokensOf(const nvinfer1::Dims& dims, int64_t in_features) {
  const Shape shape(dims);
  return Tokens(shape.dims, shape.count, in_features);
}

QELinearPlugin::QELinearPlugin(const Attributes& attributes)
    : attributes_(attributes), counter_bytes_(MostCounterBytes(attributes.problem)) {}

nvinfer1::IPluginCapability* QELinearPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::v_1_0::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::v_1_0::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::v_1_0::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* QELinearPlugin::clone() noexcept {
  auto* copy = new (std::nothrow) QELinearPlugin(*this);
  if (!copy) LogError("No memory for a copy of the plugin. Free some host memory.");
  return copy;
}

bool QELinearPlugin::Check(const nvinfer1::PluginTensorDesc* in, QeProblem& problem) const noexcept {
  if (!IsHalf(in[0].type)) return LogError(kWrongX), false;
  problem = attributes_.problem;
  problem.dtype = in[0].type == DataType::kHALF ? QE_F16 : QE_BF16;
  const int64_t tokens = TokensOf(in[0].dims, problem.K);
  if (tokens < 0 || tokens > INT32_MAX) return LogError(kWrongX), false;
  problem.M = static_cast<int32_t>(tokens);
  const Signature signature(problem);
  for (int i = 1; i < signature.count; ++i) {
    if (in[i].type == TypeOf(signature.input[i].type) && VolumeOf(in[i].dims) == signature.input[i].elements) continue;
    LogError("A weight tensor has the wrong type or size for the node's attributes. Lower the model with qe-edge build.");
    return false;
  }
  return true;
}

int32_t QELinearPlugin::configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
                                        const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) noexcept {
  if (!in || !out || inputs != Signature(attributes_.problem).count || outputs != 1) return Fail(kWrongInputs);
  nvinfer1::PluginTensorDesc fixed[kMaxInputs];
  for (int i = 0; i < inputs; ++i) fixed[i] = in[i].desc;
  fixed[0].dims = in[0].max;  // desc holds -1 where a dimension is dynamic
  QeProblem problem;
  if (!Check(fixed, problem)) return -1;
  if (const char* why = QeRefuse(&problem)) return Fail(why);
  return 0;
}

int32_t QELinearPlugin::getOutputDataTypes(DataType* types, int32_t outputs, const DataType* input_types,
                                           int32_t inputs) const noexcept {
  if (!types || !input_types || outputs != 1 || inputs != Signature(attributes_.problem).count)
    return Fail(kWrongInputs);
  if (!IsHalf(input_types[0])) return Fail(kWrongX);
  types[0] = input_types[0];
  return 0;
}

int32_t QELinearPlugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t count, const nvinfer1::DimsExprs*,
                                        int32_t, nvinfer1::DimsExprs* outputs, int32_t output_count,
                                        nvinfer1::IExprBuilder& builder) noexcept {
  if (!inputs || !outputs || output_count != 1 || count != Signature(attributes_.problem).count)
    return Fail(kWrongInputs);
  const nvinfer1::DimsExprs& x = inputs[0];
  if (x.nbDims < 2 || x.nbDims > nvinfer1::Dims::MAX_DIMS) return Fail(kWrongX);
  const nvinfer1::IDimensionExpr* last = x.d[x.nbDims - 1];
  if (last && last->isConstant() && last->getConstantValue() != attributes_.problem.K) return Fail(kWrongX);
  outputs[0] = x;
  outputs[0].d[x.nbDims - 1] = builder.constant(attributes_.problem.N);
  return 0;
}

bool QELinearPlugin::supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                               int32_t inputs, int32_t outputs) noexcept {
  QeProblem problem = attributes_.problem;
  if (!tensors || outputs != 1 || inputs != Signature(problem).count || position < 0 || position > inputs) return false;
  const nvinfer1::PluginTensorDesc& tensor = tensors[position].desc;
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
  const DataType half = tensors[0].desc.type;
  if (!IsHalf(half)) return false;
  if (position == 0 || position == inputs) return tensor.type == half;
  problem.dtype = half == DataType::kHALF ? QE_F16 : QE_BF16;
  return tensor.type == TypeOf(Signature(problem).input[position].type);
}

size_t QELinearPlugin::getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
                                        const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept {
  if (!in || inputs < 1) return 0;
  QeProblem problem = attributes_.problem;
  const int64_t most = TokensOf(in[0].max, problem.K);
  if (most < 1 || most > INT32_MAX) return 0;
  // Few tokens split K over slices, so that fewer of them may need more: up to 128 any number may need the most, up to
  // 16384 any multiple of 32, where blocks are full, and above that the largest number.
  size_t bytes = 0;
  for (int64_t tokens = 1; tokens <= std::min<int64_t>(most, 16384); tokens += tokens < 128 ? 1 : 32) {
    problem.M = static_cast<int32_t>(tokens);
    bytes = std::max(bytes, QeWorkspaceBytes(&problem));
  }
  problem.M = static_cast<int32_t>(most);
  return std::max(bytes, QeWorkspaceBytes(&problem));
}

int32_t QELinearPlugin::getNbTactics() noexcept { return kTacticCount; }

int32_t QELinearPlugin::getValidTactics(int32_t* tactics, int32_t count) noexcept {
  if (!tactics || count != kTacticCount) return Fail("TensorRT asks for another number of tactics. Report this.");
  for (int32_t i = 0; i < count; ++i) tactics[i] = i + 1;
  return 0;
}

int32_t QELinearPlugin::setTactic(int32_t tactic) noexcept {
  if (tactic < 0 || tactic > kTacticCount)
    return Fail("The engine asks for a tactic that this plugin does not have. Build the engine again.");
  tactic_ = tactic;
  return 0;
}

int32_t QELinearPlugin::onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t inputs,
                                      const nvinfer1::PluginTensorDesc* out, int32_t outputs) noexcept {
  if (!in || !out || inputs != Signature(attributes_.problem).count || outputs != 1) return Fail(kWrongInputs);
  QeProblem problem;
  if (!Check(in, problem)) return -1;
  if (problem.M == 0) return 0;  // an empty batch is legal and launches nothing
  if (const char* why = QeRefuse(&problem)) return Fail(why);
  Enter(nullptr);
  LoadAhead(problem);
  // Kernels are loaded for every number of tokens, as a stream that is captured later can load none. Once is enough.
  const unsigned long generation = launcher_.generation();
  if (loaded_generation_ == generation && loaded_tactic_ == tactic_ && loaded_dtype_ == problem.dtype) return 0;
  bool all = true;
  ForTokenClasses(problem, [&](const QeProblem& p) { all = LoadAhead(p) && all; });
  loaded_generation_ = all ? generation : 0;
  loaded_tactic_ = tactic_;
  loaded_dtype_ = problem.dtype;
  return 0;
}

void QELinearPlugin::Enter(cudaStream_t stream) noexcept {
  launcher_.Enter(counter_bytes_, stream);
  if (!launcher_.without_counters()) return;
  static std::atomic<bool> said{false};
  if (!said.exchange(true))
    LogWarning("There is no GPU memory for a layer's counters, so decode is slower. Free some and make the context anew.");
}

QeTactic QELinearPlugin::TacticFor(const QeProblem& problem) const noexcept {
  QeTactic tactic = tactic_ > 0 ? kTactics[tactic_ - 1] : QeTactic{};
  if (problem.act_bits == 0) tactic.block_rows = std::min(tactic.block_rows, 64);
  tactic.multiprocessors = launcher_.multiprocessors();
  tactic.clusters = launcher_.clusters();
  return tactic;
}

bool QELinearPlugin::LoadAhead(const QeProblem& problem) noexcept {
  const QeTactic tactic = TacticFor(problem);
  QeBuffers nowhere{};
  nowhere.counters = launcher_.counters();
  QePlan plan;
  // A problem that is refused is never run, and so needs no kernels.
  return QeMakePlan(&problem, &nowhere, &tactic, &plan) || !launcher_.Load(plan, nullptr);
}

int32_t QELinearPlugin::enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
                                const void* const* inputs, void* const* outputs, void* workspace,
                                cudaStream_t stream) noexcept {
  QeProblem problem;
  if (!in || !out || !inputs || !outputs || !Check(in, problem)) return Fail(kWrongInputs);
  if (problem.M == 0) return 0;
  const Signature signature(problem);
  const auto address = [](const void* p) { return static_cast<uint64_t>(reinterpret_cast<uintptr_t>(p)); };
  QeBuffers b{};
  for (int i = 0; i < signature.count; ++i) {
    if (!inputs[i] || address(inputs[i]) % 16)
      return Fail("An input is missing or not aligned to 16 bytes. Bind buffers from a CUDA allocation.");
    AddressOf(b, signature.input[i].role) = address(inputs[i]);
  }
  b.y = address(outputs[0]);
  b.workspace = address(workspace);
  if (!b.y || b.y % 4 || (!workspace && QeWorkspaceBytes(&problem)))
    return Fail("The output or the workspace is missing. Bind all buffers before running the engine.");
  Enter(stream);
  b.counters = launcher_.counters();
  QePlan plan;
  const QeTactic tactic = TacticFor(problem);
  if (const char* why = QeMakePlan(&problem, &b, &tactic, &plan)) return Fail(why);
  if (const char* why = launcher_.Run(plan, stream)) return Fail(why);
  return 0;
}

// Outside of any stream capture, so the place for the self-test and for the memory of the copy's counters.
nvinfer1::IPluginV3* QELinearPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
  if (const char* why = SelfTestOnce()) return LogError(why), nullptr;
  nvinfer1::IPluginV3* copy = clone();
  if (copy) static_cast<QELinearPlugin*>(copy)->Enter(nullptr);
  return copy;
}

const nvinfer1::PluginFieldCollection* QELinearPlugin::getFieldsToSerialize() noexcept {
  fields_ = FieldsOf(attributes_);
  collection_ = {kAttributeCount, fields_.data()};
  return &collection_;
}

}  // namespace qe
