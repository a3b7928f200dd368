// The inputs of a lowered QELinear node: which there are, in which order, and their exact types and sizes.
#pragma once
#include <NvInferRuntime.h>

#include "../include/qe_edge/plan.h"

namespace qe {

enum class Role { kX, kWeight, kColumns, kScales, kZeros, kInvOmega, kDown, kDownScale, kUp, kRouter };
constexpr int kMaxInputs = 10;

// What one input must be. `elements` counts values of `type`; x has none of its own.
struct Input {
  Role role;
  nvinfer1::DataType type;
  int64_t elements;
};

struct Signature {
  int count = 0;
  Input input[kMaxInputs];

  // For a problem that QeRefuse accepts; `problem.dtype` sets the 16-bit type.
  explicit Signature(const QeProblem& problem);
};

// Tokens of x: the product of all dimensions but the last. -1 when x is not [..., K] or the product is out of range.
int64_t Tokens(const nvinfer1::Dims& dims, int64_t in_features);
int64_t Volume(const nvinfer1::Dims& dims);  // -1 when a dimension is unknown or the product overflows

}  // namespace qe
