// What ONNX Runtime looks up: `session_options.register_custom_ops_library("libqe_ort.so")` calls it.
#include "operator.h"

namespace qe {
namespace {

constexpr char kDomain[] = "qe_edge";
constexpr char kTooOld[] = "QELinear: ONNX Runtime is older than 1.21. Run: pip install --upgrade onnxruntime-gpu.";

// Our domain with its operator, which options and sessions point to. Made once.
struct Domain {
  const OrtApi& api;
  OrtCustomOpDomain* domain = nullptr;
  OrtStatus* status;

  explicit Domain(const OrtApi& of) : api(of), status(api.CreateCustomOpDomain(kDomain, &domain)) {
    if (!status) status = api.CustomOpDomain_Add(domain, &TheOperator());
  }
  ~Domain() {
    if (status) api.ReleaseStatus(status);
    if (domain) api.ReleaseCustomOpDomain(domain);
  }
  Domain(const Domain&) = delete;
  Domain& operator=(const Domain&) = delete;
};

}  // namespace
}  // namespace qe

extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                                            const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (!api) return base->GetApi(1)->CreateStatus(ORT_FAIL, qe::kTooOld);
  static const qe::Domain domain(*api);
  if (domain.status) return api->CreateStatus(ORT_FAIL, "QELinear: ONNX Runtime refuses the operator. Report this.");
  return api->AddCustomOpDomain(options, domain.domain);
}
