#include "fields.h"

#include <string.h>

namespace qe {

const char* ReadFields(const nvinfer1::PluginFieldCollection* fields, Attributes& attributes) {
  if (!fields || fields->nbFields < 0 || (fields->nbFields > 0 && !fields->fields))
    return "No attributes were given. Lower the model with qe-edge build.";
  Attributes read;
  const auto slots = Integers(read);
  std::array<bool, kAttributeCount> seen{};
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    const nvinfer1::PluginField& field = fields->fields[i];
    if (!field.name) return "An attribute has no name. Build the engine again.";
    int at = 0;
    while (at < kAttributeCount && strcmp(slots[at].name, field.name) != 0) ++at;
    if (at == kAttributeCount)
      return "An attribute is unknown. Lower the model with the qe-edge release that built this plugin.";
    if (seen[at]) return "An attribute is given twice. Build the engine again.";
    if (field.type != nvinfer1::PluginFieldType::kINT32 || field.length != 1 || !field.data)
      return "An attribute is not one 32-bit integer. Lower the model with qe-edge build.";
    memcpy(slots[at].value, field.data, sizeof(int32_t));  // the data may be unaligned in a serialized engine
    seen[at] = true;
  }
  for (const bool there : seen)
    if (!there)
      return "Attributes are missing, as in a node that was not lowered. Lower the model with qe-edge build --plugin.";
  if (const char* why = CheckAttributes(read)) return why;
  attributes = read;
  return nullptr;
}

std::array<nvinfer1::PluginField, kAttributeCount> FieldsOf(const Attributes& attributes) {
  std::array<nvinfer1::PluginField, kAttributeCount> fields;
  const auto slots = Integers(const_cast<Attributes&>(attributes));  // only read through the fields
  for (int i = 0; i < kAttributeCount; ++i)
    fields[i] = nvinfer1::PluginField(slots[i].name, slots[i].value, nvinfer1::PluginFieldType::kINT32, 1);
  return fields;
}

}  // namespace qe
