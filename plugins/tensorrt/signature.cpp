#include "signature.h"

namespace qe {
namespace {

using nvinfer1::DataType;

int64_t Up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }
constexpr int64_t kMostElements = int64_t{1} << 40;

}  // namespace

Signature::Signature(const QeProblem& p) {
  const DataType half = p.dtype == QE_F16 ? DataType::kHALF : DataType::kBF16;
  const int64_t kp = Up(p.K, 128), np = Up(p.N, 32);
  const bool routed = p.num_experts > 1 && p.rank_routed > 0, zeros = p.has_zeros || p.act_bits == 0;
  const int64_t shared = p.rank_shared + (p.num_experts == 1 ? p.rank_routed : 0);
  const int64_t columns = Up(shared, 16) + (routed ? p.num_experts * Up(p.rank_routed, 16) : 0);
  const int64_t scale_rows = p.group_size < 0 ? 1 : kp / p.group_size;
  const DataType adapter = p.adapter_bits == 16 ? half : DataType::kINT8;
  const int64_t together = p.adapter_bits == 4 ? 2 : 1;  // factor values in one element
  auto add = [this](Role role, DataType type, int64_t elements) { input[count++] = {role, type, elements}; };
  add(Role::kX, half, 0);
  add(Role::kWeight, DataType::kINT8, kp * np * p.weight_bits / 8);
  add(Role::kColumns, DataType::kFLOAT, 3 * np);
  if (p.group_size > 0) add(Role::kScales, DataType::kHALF, scale_rows * np);
  if (zeros) add(Role::kZeros, DataType::kINT8, scale_rows * np);
  if (p.has_inv_omega) add(Role::kInvOmega, half, p.K);
  if (columns) {
    add(Role::kDown, adapter, Up(p.K, 32) * columns / together);
    add(Role::kDownScale, DataType::kFLOAT, columns);
    add(Role::kUp, adapter, columns * np / together);
  }
  if (routed) add(Role::kRouter, half, int64_t{p.num_experts} * p.K);
}

int64_t Volume(const nvinfer1::Dims& dims) {
  if (dims.nbDims < 0 || dims.nbDims > nvinfer1::Dims::MAX_DIMS) return -1;
  int64_t volume = 1;
  for (int i = 0; i < dims.nbDims; ++i) {
    if (dims.d[i] < 0 || (dims.d[i] && volume > kMostElements / dims.d[i])) return -1;
    volume *= dims.d[i];
  }
  return volume;
}

int64_t Tokens(const nvinfer1::Dims& dims, int64_t in_features) {
  if (dims.nbDims < 2 || dims.nbDims > nvinfer1::Dims::MAX_DIMS || dims.d[dims.nbDims - 1] != in_features) return -1;
  nvinfer1::Dims rows = dims;
  --rows.nbDims;
  return Volume(rows);
}

}  // namespace qe
