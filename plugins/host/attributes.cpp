#include "attributes.h"

namespace qe {

std::array<NamedInteger, kAttributeCount> Integers(Attributes& a) {
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

const char* CheckAttributes(Attributes& attributes) {
  if (attributes.layout_version != kLayoutVersion)
    return "The weights have another layout version. Lower the model with the qe-edge release that built this plugin.";
  attributes.problem.dtype = QE_F16;
  attributes.problem.M = 1;
  return QeRefuse(&attributes.problem);
}

}  // namespace qe
