// The kernels on a GPU: the driver API through dlopen, the fatbin that is linked into this library.
#pragma once
#include "../include/qe_edge/plan.h"

namespace qe {

// Launches a plan on a stream of the current context. Null when everything was queued, else what is wrong and what to
// do. Thread-safe; the first call of a context loads the kernels.
const char* RunPlan(const QePlan& plan, void* stream);

// Runs the self-test once per context. Null when it passed, or when there is no driver or context to test.
const char* SelfTestOnce();

}  // namespace qe
