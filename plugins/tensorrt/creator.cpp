// What TensorRT finds in the library: one creator, and where to log.
#include <NvInferRuntime.h>

#include <array>
#include <new>

#include "log.h"
#include "qe_linear_plugin.h"

namespace qe {
namespace {

class QELinearCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  QELinearCreator() : fields_(FieldsOf(prototype_)) {
    // Names and types only: a null pointer says that there is no default.
    for (nvinfer1::PluginField& field : fields_) field.data = nullptr;
    collection_ = {kAttributeCount, fields_.data()};
  }

  nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase) noexcept override {
    Attributes attributes;
    if (const char* why = ReadFields(fields, attributes)) return LogError(why), nullptr;
    auto* plugin = new (std::nothrow) QELinearPlugin(attributes);
    if (!plugin) LogError("No memory for the plugin. Free some host memory.");
    return plugin;
  }

  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return kPluginName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

 private:
  Attributes prototype_;
  std::array<nvinfer1::PluginField, kAttributeCount> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace
}  // namespace qe

#define QE_EXPORT extern "C" __attribute__((visibility("default")))

QE_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { qe::SetLoggerFinder(finder); }

QE_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static qe::QELinearCreator creator;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
  count = 1;
  return creators;
}
