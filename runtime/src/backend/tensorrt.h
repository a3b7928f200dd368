#pragma once

#include "backend/backend.h"

namespace qe_edge {

// tensorrt.cpp as it was compiled for each of the two libraries; `OpenTensorRt` chooses.
std::shared_ptr<const Backend> OpenTensorRtItself(const EngineInfo& info, const GpuOptions& options);
std::shared_ptr<const Backend> OpenTensorRtRtx(const EngineInfo& info, const GpuOptions& options);

}  // namespace qe_edge
