#include "fields.h"

#include <string.h>

namespace qe {
namespace {

struct Named {
  const char* name;
  int32_t* value;
};

std::array<Named, kFieldCount> Slots(Attributes& a) {
  QeProblem& p = a.problem;
  return {{{"layout_version", &a.layout_version},
           {"in_features", &p.K},
           {"out_features", &p.N},
           {"act_bits", &p.act_bits},
           {"group_size", &p.group_size},
           {"has_zeros", &p.has_zeros},
           {"has_inv_omega", &p.has_inv_omega},
           {"rank_shared", &p.rank_shared},
           {"rank_routed", &p.rank_routed},
           {"num_experts", &p.num_experts},
           {"adapter_bits", &p.adapter_bits},
           {"weight_bits", &p.weight_bits}}};
}

}  // namespace

const char* ReadFields(const nvinfer1::PluginFieldCollection* fields, Attributes& attributes) {
  if (!fields || fields->nbFields < 0 || (fields->nbFields > 0 && !fields->fields))
    return "No attributes were given. Lower the model with qe-edge build.";
  Attributes read;
  const auto slots = Slots(read);
  std::array<bool, kFieldCount> seen{};
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    const nvinfer1::PluginField& field = fields->fields[i];
    if (!field.name) return "An attribute has no name. Build the engine again.";
    int at = 0;
    while (at < kFieldCount && strcmp(slots[at].name, field.name) != 0) ++at;
    if (at == kFieldCount)
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
  if (read.layout_version != kLayoutVersion)
    return "The weights have another layout version. Lower the model with the qe-edge release that built this plugin.";
  read.problem.dtype = QE_F16;
  read.problem.M = 1;
  if (const char* why = QeRefuse(&read.problem)) return why;
  attributes = read;
  return nullptr;
}

std::array<nvinfer1::PluginField, kFieldCount> FieldsOf(const Attributes& attributes) {
  std::array<nvinfer1::PluginField, kFieldCount> fields;
  const auto slots = Slots(const_cast<Attributes&>(attributes));  // only read through the fields
  for (int i = 0; i < kFieldCount; ++i)
    fields[i] = nvinfer1::PluginField(slots[i].name, slots[i].value, nvinfer1::PluginFieldType::kINT32, 1);
  return fields;
}

}  // namespace qe
