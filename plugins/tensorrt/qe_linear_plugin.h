// QELinear for TensorRT 10.3 and later: IPluginV3 with its core, build and runtime parts.
#pragma once
#include <NvInferRuntime.h>

#include <array>

#include "../host/driver.h"
#include "../host/signature.h"
#include "fields.h"

namespace qe {

constexpr char kPluginName[] = "QELinear";
constexpr char kPluginVersion[] = "1";
constexpr char kPluginNamespace[] = "";

nvinfer1::DataType TypeOf(Element element);
int64_t TokensOf(const nvinfer1::Dims& dims, int64_t in_features);  // as Tokens

class QELinearPlugin final : public nvinfer1::IPluginV3,
                             public nvinfer1::v_1_0::IPluginV3OneCore,
                             public nvinfer1::v_1_0::IPluginV3OneBuild,
                             public nvinfer1::v_1_0::IPluginV3OneRuntime {
 public:
  explicit QELinearPlugin(const Attributes& attributes);
  // A copy launches on its own: it may run at the same time, so it shares no counters.
  QELinearPlugin(const QELinearPlugin& other) : QELinearPlugin(other.attributes_) { tactic_ = other.tactic_; }
  QELinearPlugin& operator=(const QELinearPlugin&) = delete;

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  // Core
  const char* getPluginName() const noexcept override { return kPluginName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  // Build
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
                          const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* types, int32_t outputs, const nvinfer1::DataType* input_types,
                             int32_t inputs) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t count, const nvinfer1::DimsExprs*, int32_t,
                          nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override;
  int32_t getNbOutputs() const noexcept override { return 1; }
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
                          const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) const noexcept override;
  int32_t getValidTactics(int32_t* tactics, int32_t count) noexcept override;
  int32_t getNbTactics() noexcept override;

  // Runtime
  int32_t setTactic(int32_t tactic) noexcept override;
  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t inputs, const nvinfer1::PluginTensorDesc* out,
                        int32_t outputs) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

 private:
  // The problem of these descriptors. False, with an error logged, when a type or size is not what the layer needs.
  bool Check(const nvinfer1::PluginTensorDesc* x, QeProblem& problem) const noexcept;
  // Makes the launcher ready for the current context, and says once if that has no memory for counters.
  void Enter(cudaStream_t stream) noexcept;
  QeTactic TacticFor(const QeProblem& problem) const noexcept;
  // Loads the kernels of a problem. False when some could not be loaded.
  bool LoadAhead(const QeProblem& problem) noexcept;

  Attributes attributes_;
  size_t counter_bytes_;  // that any number of tokens needs
  int32_t tactic_ = 0;
  Launcher launcher_;
  // What all kernels were loaded for; see onShapeChange.
  unsigned long loaded_generation_ = 0;
  int32_t loaded_tactic_ = 0, loaded_dtype_ = 0;
  std::array<nvinfer1::PluginField, kAttributeCount> fields_{};
  nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace qe
