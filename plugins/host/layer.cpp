#include "../include/qe_edge/layer.h"

#include <new>

#include "attributes.h"
#include "driver.h"
#include "token_classes.h"

#define QE_EXPORT extern "C" __attribute__((visibility("default")))

struct QeLayer {
  size_t counter_bytes;
  qe::Launcher launcher;
};

namespace {

const char* Run(qe::Launcher& launcher, const QeProblem& problem, const QeBuffers& buffers, void* stream) {
  QeTactic tactic{};
  tactic.multiprocessors = launcher.multiprocessors();
  tactic.clusters = launcher.clusters();
  QePlan plan;
  if (const char* why = QeMakePlan(&problem, &buffers, &tactic, &plan)) return why;
  return launcher.Run(plan, stream);
}

}  // namespace

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
  return Run(launcher, *problem, *buffers, stream);
}

QE_EXPORT int32_t QeLayoutVersion() { return qe::kLayoutVersion; }

QE_EXPORT QeLayer* QeOpenLayer(const QeProblem* problem, const char** why) {
  const char* unused = nullptr;
  const char*& reason = why ? *why : unused;
  if (!problem) return reason = "A layer has no problem. Give one.", nullptr;
  QeProblem one = *problem;
  one.M = 1;
  if ((reason = QeRefuse(&one))) return nullptr;
  auto* layer = new (std::nothrow) QeLayer{qe::MostCounterBytes(one), {}};
  if (!layer) reason = "No memory for a layer. Free some host memory.";
  return layer;
}

QE_EXPORT const char* QeRunOpenLayer(QeLayer* layer, const QeProblem* problem, const QeBuffers* buffers, void* stream) {
  if (!layer || !problem || !buffers) return "A layer has no problem or no buffers. Give both.";
  layer->launcher.Enter(layer->counter_bytes, stream);
  QeBuffers with_counters = *buffers;
  with_counters.counters = layer->launcher.counters();
  return Run(layer->launcher, *problem, with_counters, stream);
}

QE_EXPORT void QeCloseLayer(QeLayer* layer) { delete layer; }
