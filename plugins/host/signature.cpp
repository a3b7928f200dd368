#include "signature.h"

namespace qe {
namespace {

int64_t Up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }
constexpr int64_t kMostElements = int64_t{1} << 40;

}  // namespace

Signature::Signature(const QeProblem& p) {
  const Element half = p.dtype == QE_F16 ? Element::kFloat16 : Element::kBFloat16;
  const int64_t kp = Up(p.K, 128), np = Up(p.N, 32);
  const bool routed = p.num_experts > 1 && p.rank_routed > 0, zeros = p.has_zeros || p.act_bits == 0;
  const int64_t shared = p.rank_shared + (p.num_experts == 1 ? p.rank_routed : 0);
  const int64_t columns = Up(shared, 16) + (routed ? p.num_experts * Up(p.rank_routed, 16) : 0);
  const int64_t scale_rows = p.group_size < 0 ? 1 : kp / p.group_size;
  const Element adapter = p.adapter_bits == 16 ? half : Element::kInt8;
  const int64_t together = p.adapter_bits == 4 ? 2 : 1;  // factor values in one element
  auto add = [this](Role role, Element type, int64_t elements) { input[count++] = {role, type, elements}; };
  add(Role::kX, half, 0);
  add(Role::kWeight, Element::kInt8, kp * np * p.weight_bits / 8);
  add(Role::kColumns, Element::kFloat32, 3 * np);
  if (p.group_size > 0) add(Role::kScales, Element::kFloat16, scale_rows * np);
  if (zeros) add(Role::kZeros, Element::kInt8, scale_rows * np);
  if (p.has_inv_omega) add(Role::kInvOmega, half, p.K);
  if (columns) {
    add(Role::kDown, adapter, Up(p.K, 32) * columns / together);
    add(Role::kDownScale, Element::kFloat32, columns);
    add(Role::kUp, adapter, columns * np / together);
  }
  if (routed) add(Role::kRouter, half, int64_t{p.num_experts} * p.K);
}

uint64_t& AddressOf(QeBuffers& b, Role role) {
  uint64_t* const slots[] = {&b.x,         &b.weight, &b.columns,    &b.scales, &b.zeros,
                             &b.inv_omega, &b.down,   &b.down_scale, &b.up,     &b.router};  // in the order of Role
  return *slots[static_cast<int>(role)];
}

int64_t Volume(const int64_t* dims, int count) {
  int64_t volume = 1;
  for (int i = 0; i < count; ++i) {
    if (dims[i] < 0 || (dims[i] && volume > kMostElements / dims[i])) return -1;
    volume *= dims[i];
  }
  return volume;
}

int64_t Tokens(const int64_t* dims, int count, int64_t in_features) {
  return count < 2 || count > kMaxDims || dims[count - 1] != in_features ? -1 : Volume(dims, count - 1);
}

}  // namespace qe
