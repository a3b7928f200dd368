// host/layer.cpp on the stand-in driver: prints what went wrong, and nothing when all is right.
#include <stdio.h>
#include <string.h>

#include <atomic>
#include <initializer_list>
#include <thread>

#include "../host/attributes.h"
#include "../host/self_test.h"
#include "../include/qe_edge/layer.h"
#include "standin_driver.h"

extern "C" {
extern const unsigned char qe_fatbin_cuda12[1] = {0}, qe_fatbin_cuda13[1] = {0};
extern const unsigned long long qe_fatbin_cuda12_bytes = 1;
}

namespace {
bool answers_are_wrong = false;
}

namespace qe {
// In place of host/self_test.cpp, whose problems need kernels that compute.
const char* const kWrongResults = "The kernels compute something else. Report this.";
const char* SelfTest(Device&) { return answers_are_wrong ? kWrongResults : nullptr; }
}  // namespace qe

namespace {

std::atomic<int> failures{0};
void Expect(bool right, const char* what, int line) {
  if (!right) ++failures, printf("line %d: %s\n", line, what);
}
#define EXPECT(condition) Expect(condition, #condition, __LINE__)

void* const kStream = reinterpret_cast<void*>(64);

QeProblem Problem(int32_t tokens) {
  QeProblem p{};
  p.M = tokens, p.N = 96, p.K = 256;
  p.act_bits = 8, p.group_size = -1, p.adapter_bits = 16, p.weight_bits = 4;
  return p;
}

// Addresses that nothing reads: the stand-in runs no kernel.
QeBuffers Buffers() {
  QeBuffers b{};
  uint64_t at = 1 << 20;
  for (uint64_t* address : {&b.x, &b.weight, &b.columns, &b.y, &b.workspace, &b.counters}) *address = at += 4096;
  return b;
}

long Launches(const QeProblem& problem) {
  const QeBuffers buffers = Buffers();
  QeTactic tactic{};
  QePlan plan;
  return QeMakePlan(&problem, &buffers, &tactic, &plan) ? -1 : plan.count;
}

void Memory() {
  size_t workspace = 0, counters = 0;
  QeProblem problem = Problem(1);
  EXPECT(!QeLayerMemory(&problem, &workspace, &counters));
  EXPECT(workspace == QeWorkspaceBytes(&problem) && counters == QeCounterBytes(&problem) && workspace);
  problem.group_size = 7;
  const char* why = QeLayerMemory(&problem, &workspace, &counters);
  EXPECT(why && strstr(why, ". "));
  EXPECT(QeLayerMemory(nullptr, &workspace, &counters) && QeLayerMemory(&problem, nullptr, &counters));
}

void NoContext() {
  const QeProblem problem = Problem(1);
  const QeBuffers buffers = Buffers();
  EXPECT(QeCheckKernels() && QeRunLayer(&problem, &buffers, kStream));
  EXPECT(QeRunLayer(nullptr, &buffers, kStream) && QeRunLayer(&problem, nullptr, kStream));
  EXPECT(standin_counts().launches == 0);
}

void Runs() {
  void* context = standin_create(0);
  standin_make_current(context);
  EXPECT(!QeCheckKernels() && !QeCheckKernels());
  const QeBuffers buffers = Buffers();
  long launches = 0;
  for (const int32_t tokens : {1, 2, 1, 300}) {
    const QeProblem problem = Problem(tokens);
    EXPECT(!QeRunLayer(&problem, &buffers, kStream));
    launches += Launches(problem);
    EXPECT(standin_counts().launches == launches);
  }
  EXPECT(standin_counts().loads == 1 && standin_counts().dead_launches == 0 && standin_counts().allocated == 0);
  QeProblem refused = Problem(1);
  refused.act_bits = 5;
  EXPECT(QeRunLayer(&refused, &buffers, kStream) && standin_counts().launches == launches);

  // Another thread has a launcher of its own, and shares what the context has loaded.
  std::thread other([&] {
    standin_make_current(context);
    const QeProblem problem = Problem(1);
    EXPECT(!QeRunLayer(&problem, &buffers, kStream));
  });
  other.join();
  EXPECT(standin_counts().loads == 1 && standin_counts().dead_launches == 0);
}

// A stream that is captured can load nothing: what ran before is captured, what did not is refused.
void Capture() {
  void* context = standin_create(1);
  standin_make_current(context);
  const QeBuffers buffers = Buffers();
  const QeProblem problem = Problem(1);
  standin_capture(kStream, 1);
  const char* why = QeRunLayer(&problem, &buffers, kStream);
  EXPECT(why && strstr(why, "captured"));
  standin_capture(kStream, 0);
  EXPECT(!QeRunLayer(&problem, &buffers, kStream));
  standin_capture(kStream, 1);
  EXPECT(!QeRunLayer(&problem, &buffers, kStream));
  standin_capture(kStream, 0);
  EXPECT(standin_counts().spoilt_captures == 0);
  answers_are_wrong = true;
  EXPECT(QeCheckKernels() == qe::kWrongResults);
}

// Layers with counters of their own: what libqe_ort.so has of every node, one for each stream.
void OpenLayers() {
  EXPECT(QeLayoutVersion() == qe::kLayoutVersion);
  QeProblem problem = Problem(1);
  const char* why = nullptr;
  problem.act_bits = 5;
  EXPECT(!QeOpenLayer(&problem, &why) && why && strstr(why, ". "));
  EXPECT(!QeOpenLayer(nullptr, &why) && why && !QeOpenLayer(nullptr, nullptr));
  problem = Problem(1);
  QeLayer *one = QeOpenLayer(&problem, &why), *two = QeOpenLayer(&problem, nullptr);
  const QeBuffers buffers = Buffers();
  EXPECT(one && two && !why && QeRunOpenLayer(nullptr, &problem, &buffers, kStream));

  void* context = standin_create(2);
  standin_make_current(context);
  const StandinCounts before = standin_counts();
  EXPECT(before.allocated == 0);
  for (QeLayer* layer : {one, two, one}) EXPECT(!QeRunOpenLayer(layer, &problem, &buffers, kStream));
  EXPECT(standin_counts().allocated == 2 && standin_counts().launches == before.launches + 3 * Launches(problem));
  problem = Problem(300);
  EXPECT(!QeRunOpenLayer(one, &problem, &buffers, kStream) && standin_counts().allocated == 2);

  // What has run can be captured; a layer that has no counters yet cannot.
  QeLayer* late = QeOpenLayer(&problem, nullptr);
  standin_capture(kStream, 1);
  EXPECT(!QeRunOpenLayer(one, &problem, &buffers, kStream));
  why = QeRunOpenLayer(late, &problem, &buffers, kStream);
  EXPECT(why && strstr(why, "captured"));
  standin_capture(kStream, 0);
  EXPECT(standin_counts().spoilt_captures == 0 && !QeRunOpenLayer(late, &problem, &buffers, kStream));
  QeCloseLayer(one), QeCloseLayer(late), QeCloseLayer(nullptr);
  EXPECT(standin_counts().allocated == 1);
  standin_destroy(context);  // before the layer
  QeCloseLayer(two);
  EXPECT(standin_counts().allocated == 0 && standin_counts().dead_memory == 0 && standin_counts().dead_launches == 0);
}

}  // namespace

int main() {
  NoContext();
  Memory();
  Runs();
  OpenLayers();
  Capture();
  return failures != 0;
}
