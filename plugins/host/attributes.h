// The attributes of a lowered QELinear node: 32-bit integers by name. They come from a file, so every one is checked before
// it is used.
#pragma once
#include <array>

#include "../include/qe_edge/plan.h"

namespace qe {

constexpr int kLayoutVersion = 4;  // of the prepacked tensors; prepack/ writes the same number
constexpr int kAttributeCount = 12;

// The attributes that describe the layer; QeProblem's dtype and M are known only when tensors are.
struct Attributes {
  QeProblem problem{};  // with dtype = QE_F16 and M = 1
  int32_t layout_version = 0;
};

struct NamedInteger {
  const char* name;
  int32_t* value;
};

// The names that a node gives, and where their values are in `attributes`.
std::array<NamedInteger, kAttributeCount> Integers(Attributes& attributes);

// Completes the problem of attributes that were read. Null when together they describe a layer that the kernels run; else
// one sentence that says what is wrong and one that says what to do.
const char* CheckAttributes(Attributes& attributes);

}  // namespace qe
