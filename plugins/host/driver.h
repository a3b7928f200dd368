// The kernels on a GPU: what a plugin launches its plans with.
#pragma once
#include <memory>
#include <vector>

#include "../include/qe_edge/plan.h"
#include "contexts.h"

namespace qe {

constexpr size_t kMaxLaunches = sizeof(QePlan::launch) / sizeof(QeLaunch);

// Launches plans in the current context. A launch takes no lock, and finds its kernel in a table of this launcher: an
// enqueue costs two short questions to the driver, which context is current and its id, and the launches. (Drivers before
// CUDA 12 give no ids. They are asked for one kernel instead.) Several launchers may work at the same time, in one
// context or in several; one launcher is for one thread at a time, as TensorRT runs an execution context.
//
//   launcher.Enter(counter_bytes, stream);
//   ... a plan with launcher.counters(), launcher.multiprocessors() and launcher.clusters() ...
//   const char* why = launcher.Run(plan, stream);
class Launcher {
 public:
  Launcher() { Leave(); }
  Launcher(const Launcher&) = delete;
  Launcher& operator=(const Launcher&) = delete;
  ~Launcher() { Leave(); }

  // Makes ready for plans in the current context with this many bytes of counters. In a context that it does not know
  // yet it allocates and zeroes them, which no stream may be captured for. What is wrong is said by Load and Run.
  void Enter(size_t counter_bytes, void* stream);

  // QeBuffers.counters: zero, and nobody else's. The address stays the same in one context. 0 where there is no memory
  // for them, and plans do without.
  uint64_t counters() const { return counters_; }
  // Whether there was no memory for them.
  bool without_counters() const { return reserved_ && counter_bytes_ && !counters_; }
  // QeTactic.multiprocessors; 0 without a context.
  int multiprocessors() const { return loaded_ ? loaded_->multiprocessors : 0; }
  // QeTactic.clusters.
  int clusters() const { return loaded_ && loaded_->clusters > 0; }
  // Changes whenever everything has to be loaded again; never 0 in a context.
  unsigned long generation() const { return loaded_ ? generation_ : 0; }

  // Loads the kernels of a plan, so that a capture can launch them. Null, or what is wrong and what to do.
  const char* Load(const QePlan& plan, void* stream);
  // Queues the launches of a plan. Null, or what is wrong and what to do. Kernels that are not loaded yet are loaded
  // first, unless the stream is being captured: that is an error, which leaves the capture valid.
  const char* Run(const QePlan& plan, void* stream);

 private:
  struct Entry {
    char name[sizeof QeLaunch::kernel];
    Kernel kernel;
  };

  bool Knows(const Driver& driver) const;
  const char* Reserve(const Driver& driver, size_t bytes, void* stream);
  const char* Zero(const Driver& driver, void* stream);
  const Kernel* Find(const QeLaunch& launch, size_t place);
  const char* Resolve(const Driver& driver, const QePlan& plan, void* stream, Kernel* kernels);
  void Leave();

  const char* why_ = nullptr;       // why nothing can be launched
  std::shared_ptr<Loaded> loaded_;  // of the context that this is ready for
  unsigned long generation_ = 0;
  std::vector<Entry> kernels_;      // a handful
  size_t last_[kMaxLaunches] = {};  // which of them each launch of a plan was last time
  uint64_t counters_ = 0;
  size_t counter_bytes_ = 0;
  bool reserved_ = false;  // counters were asked for; there may be no memory
  bool unknown_ = false;   // a plan stopped half way, so they may not be zero
};

// Runs the self-test until it has an answer, once per context. Null when it passed, or when there is no driver or context
// to test. Not while a stream is captured.
const char* SelfTestOnce();

}  // namespace qe
