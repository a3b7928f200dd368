// The inputs of a lowered QELinear node: which there are, in which order, and their exact types and sizes.
#pragma once
#include "../include/qe_edge/plan.h"

namespace qe {

enum class Role { kX, kWeight, kColumns, kScales, kZeros, kInvOmega, kDown, kDownScale, kUp, kRouter };
enum class Element { kFloat16, kBFloat16, kInt8, kFloat32 };
constexpr int kMaxInputs = 10;
constexpr int kMaxDims = 8;  // of x

// What one input must be. `elements` counts values of `type`; x has none of its own.
struct Input {
  Role role;
  Element type;
  int64_t elements;
};

struct Signature {
  int count = 0;
  Input input[kMaxInputs];

  // For a problem that QeRefuse accepts; `problem.dtype` sets the 16-bit type.
  explicit Signature(const QeProblem& problem);
};

// Where the address of an input belongs.
uint64_t& AddressOf(QeBuffers& buffers, Role role);

// The product of `count` dimensions; -1 when one is unknown or the product is out of range.
int64_t Volume(const int64_t* dims, int count);
// Tokens of x: the product of all dimensions but the last. -1 when x is not [..., K] of rank 2 to 8, or out of range.
int64_t Tokens(const int64_t* dims, int count, int64_t in_features);

}  // namespace qe
