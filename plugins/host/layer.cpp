#include "../include/qe_edge/layer.h"

#include "driver.h"

#define QE_EXPORT extern "C" __attribute__((visibility("default")))

QE_EXPORT const char* QeCheckKernels() {
  qe::Launcher launcher;
  launcher.Enter(0, nullptr);
  const QePlan nothing{};
  if (const char* why = launcher.Load(nothing, nullptr)) return why;  // no driver, or no context
  return qe::SelfTestOnce();
}

QE_EXPORT const char* QeLayerMemory(const QeProblem* problem, size_t* workspace_bytes, size_t* counter_bytes) {
  if (!problem || !workspace_bytes || !counter_bytes) return "A question about memory lacks an argument. Give all three.";
  if (const char* why = QeRefuse(problem)) return why;
  *workspace_bytes = QeWorkspaceBytes(problem);
  *counter_bytes = QeCounterBytes(problem);
  return nullptr;
}

QE_EXPORT const char* QeRunLayer(const QeProblem* problem, const QeBuffers* buffers, void* stream) {
  if (!problem || !buffers) return "A layer has no problem or no buffers. Give both.";
  thread_local qe::Launcher launcher;  // one is for one thread at a time
  launcher.Enter(0, stream);           // the caller gives the counters
  QeTactic tactic{};
  tactic.multiprocessors = launcher.multiprocessors();
  tactic.clusters = launcher.clusters();
  QePlan plan;
  if (const char* why = QeMakePlan(problem, buffers, &tactic, &plan)) return why;
  return launcher.Run(plan, stream);
}
