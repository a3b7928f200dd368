// What the scenarios of check_driver.cpp share: plans, a self-test that can be wrong, and a count of our code's locks.
// Included once.
#pragma once

#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include <atomic>
#include <initializer_list>
#include <optional>
#include <thread>

#include "../host/driver.h"
#include "../host/self_test.h"
#include "standin_driver.h"

extern "C" {
extern const unsigned char qe_fatbin_cuda12[1] = {0}, qe_fatbin_cuda13[1] = {0};
extern const unsigned long long qe_fatbin_cuda12_bytes = 1;

std::atomic<long> locks{0};
int __real_pthread_mutex_lock(pthread_mutex_t* mutex);
int __wrap_pthread_mutex_lock(pthread_mutex_t* mutex) { return ++locks, __real_pthread_mutex_lock(mutex); }
}

namespace {
bool answers_are_wrong = false;
int self_tests = 0;

// Like the plugin's plans: the first launch overlaps nothing. The kernel is the last one.
QePlan Plan(const char* kernel, unsigned shared_bytes = 1024, int count = 2) {
  QePlan plan{};
  plan.count = count;
  const char* names[] = {"prepare", "down", "main"};
  names[count - 1] = kernel;
  for (int i = 0; i < count; ++i) {
    QeLaunch& launch = plan.launch[i];
    launch.grid_x = launch.grid_y = launch.threads = 1;
    launch.overlaps = i > 0;
    snprintf(launch.kernel, sizeof launch.kernel, "%s", names[i]);
  }
  plan.launch[count - 1].shared_bytes = shared_bytes;
  return plan;
}

}  // namespace

namespace qe {
// In place of host/self_test.cpp, whose problems need kernels that compute.
const char* const kWrongResults = "wrong";
const char* SelfTest(Device& device) {
  ++self_tests;
  const uint64_t counters = device.Counters(64);
  if (!counters) return "no memory";
  uint32_t counter = 1;
  device.Read(counters, &counter, sizeof counter);
  if (counter) return "no zero";
  if (device.Multiprocessors() < 100) return "no multiprocessors";
  if (const char* why = device.Run(Plan("main"))) return why;
  return answers_are_wrong ? kWrongResults : nullptr;
}
}  // namespace qe

namespace {

std::atomic<int> failures{0};
void Expect(bool right, const char* what, int line) {
  if (!right) ++failures, printf("line %d: %s\n", line, what);
}
#define EXPECT(condition) Expect(condition, #condition, __LINE__)

void* const kStream = reinterpret_cast<void*>(64);
constexpr size_t kCounterBytes = 64;

// What an enqueue does.
const char* Run(qe::Launcher& launcher, const QePlan& plan, void* stream = kStream) {
  launcher.Enter(kCounterBytes, stream);
  return launcher.Run(plan, stream);
}

bool AreZero(uint64_t counters) {
  const auto* words = reinterpret_cast<const uint32_t*>(counters);
  for (size_t i = 0; i < kCounterBytes / 4; ++i)
    if (words[i]) return false;
  return true;
}

void* NewContext(int place) {
  void* context = standin_create(place);
  standin_make_current(context);
  return context;
}

}  // namespace
