// Which of the two TensorRT libraries runs engines, and what is said where the build has none.

#include "backend/tensorrt.h"
#include "base/error.h"

namespace qe_edge {
namespace {

[[maybe_unused]] Error BuiltWithout(const std::string& name, const std::string& option) {
  return Error(QE_ERROR_TARGET, "These engines are for " + name + ", and this libqe_edge was built without it.",
               "Build it with -D" + option + "=FOLDER_OF_ITS_HEADERS, or give the output folder of 'qe-edge export'.");
}

}  // namespace

std::shared_ptr<const Backend> OpenTensorRt(const EngineInfo& info, const GpuOptions& options) {
  if (info.backend == "tensorrt_rtx") {
#ifdef QE_HAS_TENSORRT_RTX
    return OpenTensorRtRtx(info, options);
#else
    throw BuiltWithout("TensorRT-RTX", "QE_EDGE_TENSORRT_RTX");
#endif
  }
#ifdef QE_HAS_TENSORRT
  return OpenTensorRtItself(info, options);
#else
  (void)options;
  throw BuiltWithout("TensorRT", "QE_EDGE_TENSORRT");
#endif
}

}  // namespace qe_edge
