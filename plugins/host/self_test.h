// Rung 8: before a context's first use, small problems with known answers run on the device. A mismatch is an error,
// not a warning. The same code runs on the source emulator in tests/test_self_test.py.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "../include/qe_edge/plan.h"

namespace qe {

// Where the problems run.
class Device {
 public:
  virtual ~Device() = default;
  // Memory with these contents, or scratch when they are null; 0 when there is none. Freed with the device.
  virtual uint64_t Allocate(size_t bytes, const void* contents) = 0;
  // QeBuffers.counters, zeroed. 0 where there are none, and plans do without.
  virtual uint64_t Counters(size_t) { return 0; }
  // QeTactic.multiprocessors.
  virtual int Multiprocessors() { return 0; }
  // QeTactic.clusters.
  virtual bool Clusters() { return false; }
  // Runs the launches and waits. Null, or what went wrong.
  virtual const char* Run(const QePlan& plan) = 0;
  virtual bool Read(uint64_t address, void* to, size_t bytes) = 0;
};

// What the self-test says of wrong answers. Everything else that it says may be otherwise when it runs again.
extern const char* const kWrongResults;

// Null when all answers are right, else what is wrong and what to do.
const char* SelfTest(Device& device);

}  // namespace qe
