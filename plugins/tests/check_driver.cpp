// host/driver.cpp on the stand-in driver: `check_driver SCENARIO` prints what went wrong, and nothing when all is right.
#include <stdio.h>
#include <string.h>

#include <initializer_list>
#include <thread>

#include "../host/driver.h"
#include "../host/self_test.h"
#include "standin_driver.h"

extern "C" {
extern const unsigned char qe_fatbin_cuda12[1] = {0}, qe_fatbin_cuda13[1] = {0};
extern const unsigned long long qe_fatbin_cuda12_bytes = 1;
}

namespace {
bool answers_are_wrong = false;
int self_tests = 0;

QePlan Plan(const char* kernel, unsigned shared_bytes = 1024) {
  QePlan plan{};
  plan.count = 2;
  for (QeLaunch& launch : plan.launch) launch.grid_x = launch.grid_y = launch.threads = 1;
  snprintf(plan.launch[0].kernel, sizeof plan.launch[0].kernel, "prepare");
  snprintf(plan.launch[1].kernel, sizeof plan.launch[1].kernel, "%s", kernel);
  plan.launch[1].shared_bytes = shared_bytes;
  return plan;
}

}  // namespace

namespace qe {
// In place of host/self_test.cpp, whose problems need kernels that compute.
const char* const kWrongResults = "wrong";
const char* SelfTest(Device& device) {
  ++self_tests;
  if (!device.Allocate(64, nullptr)) return "no memory";
  if (const char* why = device.Run(Plan("main"))) return why;
  return answers_are_wrong ? kWrongResults : nullptr;
}
}  // namespace qe

namespace {

int failures = 0;
void Expect(bool right, const char* what) {
  if (!right) ++failures, printf("%s\n", what);
}
#define EXPECT(condition) Expect(condition, #condition)

void* const kStream = reinterpret_cast<void*>(64);

void* NewContext(int place) {
  void* context = standin_create(place);
  standin_make_current(context);
  return context;
}

void MadeAnew() {
  void* first = NewContext(0);
  EXPECT(!qe::SelfTestOnce() && !qe::RunPlan(Plan("main"), kStream) && !qe::RunPlan(Plan("main"), kStream));
  EXPECT(standin_counts().loads == 1);
  for (long round = 2; round < 5; ++round) {
    standin_destroy(first);
    EXPECT(NewContext(0) == first);
    if (round == 3) EXPECT(!qe::SelfTestOnce());
    EXPECT(!qe::RunPlan(Plan("main", 64 << 10), kStream) && !qe::RunPlan(Plan("other"), kStream));
    EXPECT(standin_counts().loads == round);
  }
  EXPECT(standin_counts().dead_launches == 0 && standin_counts().launches == 6 + 3 * 4 + 2);
}

void TestedAgain() {
  void* first = NewContext(1);
  EXPECT(!qe::SelfTestOnce() && !qe::SelfTestOnce() && self_tests == 1);
  standin_destroy(first);
  NewContext(1);
  answers_are_wrong = true;
  EXPECT(qe::SelfTestOnce() == qe::kWrongResults && qe::SelfTestOnce() == qe::kWrongResults && self_tests == 2);
}

void NoMemory() {
  NewContext(0);
  standin_fail_allocations(2);
  EXPECT(qe::SelfTestOnce() && qe::SelfTestOnce());
  EXPECT(!qe::SelfTestOnce() && !qe::SelfTestOnce() && self_tests == 3);
  EXPECT(standin_counts().allocated == 0);
}

void TwoContexts() {
  void *one = standin_create(0), *two = standin_create(1);
  for (void* context : {one, two, one, two}) {
    standin_make_current(context);
    EXPECT(!qe::RunPlan(Plan("main"), kStream));
  }
  EXPECT(standin_counts().loads == 2 && standin_counts().dead_launches == 0);
  standin_destroy(one);
  standin_make_current(two);
  EXPECT(!qe::RunPlan(Plan("main"), kStream) && standin_counts().loads == 2);
}

void TwoThreads() {
  void *one = standin_create(0), *two = standin_create(1);
  standin_make_current(two);
  EXPECT(!qe::RunPlan(Plan("main"), kStream));
  standin_wait_in_load(1);
  std::thread other([&] {  // loads, and waits meanwhile until the context `two` has launched
    standin_make_current(one);
    EXPECT(!qe::RunPlan(Plan("main"), kStream));
  });
  while (standin_counts().loads < 2) std::this_thread::yield();
  EXPECT(!qe::RunPlan(Plan("main"), kStream));
  other.join();
  EXPECT(standin_counts().timeouts == 0 && standin_counts().dead_launches == 0 && standin_counts().launches == 6);
}

void OneContextManyThreads() {
  void* context = standin_create(0);
  std::thread threads[4];
  for (std::thread& thread : threads)
    thread = std::thread([&] {
      standin_make_current(context);
      for (int i = 0; i < 50; ++i)
        if (qe::SelfTestOnce() || qe::RunPlan(Plan(i % 2 ? "main" : "other"), kStream)) printf("a thread failed\n");
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT(standin_counts().loads == 1 && standin_counts().launches == 402 && self_tests == 1);
}

void Capture() {
  NewContext(0);
  standin_capture(kStream, 1);
  const char* why = qe::RunPlan(Plan("main"), kStream);
  EXPECT(why && strstr(why, "captured") && strstr(why, "Run the engine once"));
  why = qe::SelfTestOnce();
  EXPECT(why && strstr(why, "captured") && self_tests == 0);
  qe::LoadAhead(Plan("main"));
  EXPECT(standin_counts().spoilt_captures == 0 && standin_counts().loads == 0 && standin_counts().launches == 0);
  standin_capture(kStream, 0);
  EXPECT(!qe::SelfTestOnce());
  qe::LoadAhead(Plan("main", 64 << 10));
  standin_capture(kStream, 1);
  EXPECT(!qe::RunPlan(Plan("main", 64 << 10), kStream) && !qe::SelfTestOnce());
  EXPECT(qe::RunPlan(Plan("other"), kStream));           // not loaded ahead
  EXPECT(qe::RunPlan(Plan("main", 96 << 10), kStream));  // needs more shared memory than it was given
  EXPECT(standin_counts().spoilt_captures == 0 && standin_counts().launches == 4);
  standin_capture(kStream, 0);
  EXPECT(!qe::RunPlan(Plan("other"), kStream) && !qe::RunPlan(Plan("main", 96 << 10), kStream));
}

void NoContext() {
  EXPECT(qe::RunPlan(Plan("main"), kStream) && !qe::SelfTestOnce());
  qe::LoadAhead(Plan("main"));
  EXPECT(standin_counts().loads == 0);
}

constexpr struct {
  const char* name;
  void (*run)();
} kScenarios[] = {{"made_anew", MadeAnew},     {"tested_again", TestedAgain}, {"no_memory", NoMemory},
                  {"two_contexts", TwoContexts}, {"two_threads", TwoThreads},   {"many_threads", OneContextManyThreads},
                  {"capture", Capture},          {"no_context", NoContext}};

}  // namespace

int main(int argc, char** argv) {
  for (const auto& scenario : kScenarios)
    if (argc == 2 && !strcmp(argv[1], scenario.name)) return scenario.run(), failures != 0;
  return printf("There is no such scenario.\n"), 2;
}
