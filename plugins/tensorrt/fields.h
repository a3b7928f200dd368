// Attributes as TensorRT hands them over, which are also what an engine stores.
#pragma once
#include <NvInferRuntime.h>

#include <array>

#include "../host/attributes.h"

namespace qe {

// Null when all fields are there, once each, of the right type, and together describe a layer that the kernels run;
// else one sentence that says what is wrong and one that says what to do.
const char* ReadFields(const nvinfer1::PluginFieldCollection* fields, Attributes& attributes);

// The names that a node or an engine gives, and pointers to the values of `attributes`.
std::array<nvinfer1::PluginField, kAttributeCount> FieldsOf(const Attributes& attributes);

}  // namespace qe
