// The attributes of a lowered QELinear node, which are also what an engine stores: 32-bit integers by name.
// They come from a file, so every one is checked before it is used.
#pragma once
#include <NvInferRuntime.h>

#include <array>

#include "../include/qe_edge/plan.h"

namespace qe {

constexpr int kLayoutVersion = 4;  // of the prepacked tensors; prepack/ writes the same number
constexpr int kFieldCount = 12;

// The attributes that describe the layer; QeProblem's dtype and M are known only when tensors are.
struct Attributes {
  QeProblem problem{};  // with dtype = QE_F16 and M = 1
  int32_t layout_version = 0;
};

// Null when all fields are there, once each, of the right type, and together describe a layer that the kernels run;
// else one sentence that says what is wrong and one that says what to do.
const char* ReadFields(const nvinfer1::PluginFieldCollection* fields, Attributes& attributes);

// The names that a node or an engine gives, and pointers to the values of `attributes`.
std::array<nvinfer1::PluginField, kFieldCount> FieldsOf(const Attributes& attributes);

}  // namespace qe
