// The kernels on a GPU: the driver API through dlopen, the fatbin that is linked into this library.
#pragma once
#include "../include/qe_edge/plan.h"

namespace qe {

// Launches a plan on a stream of the current context. Null when everything was queued, else what is wrong and what to
// do. Thread-safe, and no context waits for another. Kernels that are not loaded yet are loaded first, unless the stream
// is being captured: that is an error, which leaves the capture valid.
const char* RunPlan(const QePlan& plan, void* stream);

// Loads the kernels of a plan into the current context, if there is one, so that a capture can launch them. What cannot be
// loaded is said by RunPlan.
void LoadAhead(const QePlan& plan);

// Runs the self-test until it has an answer, once per context. Null when it passed, or when there is no driver or context
// to test. Not while a stream is captured.
const char* SelfTestOnce();

}  // namespace qe
