// What each CUDA context has loaded. The launchers of one context share it, and copy what they need for launches.
#pragma once
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "../include/qe_edge/plan.h"
#include "cuda_driver.h"

namespace qe {

constexpr unsigned kDefaultSharedBytes = 48 << 10;

struct Kernel {
  Function function = nullptr;
  unsigned shared_bytes = kDefaultSharedBytes;  // that it may be launched with
  bool overlaps = false;                        // its code may wait for the launch in front of it
};

// Its mutexes are its own, so that no context waits for another.
struct Loaded {
  const Context context;
  const unsigned long long id;  // of the context; 0 where the driver gives none
  int multiprocessors = 0;      // of its GPU; set once, before anybody else sees this
  int capability = 0;           // 90 for 9.0; likewise

  std::atomic<int> clusters{-1};  // whether kernels of clusters are there; -1: nobody asked yet

  std::mutex mutex;  // of `module` and `kernels`
  Module module = nullptr;
  std::map<std::string, Kernel, std::less<>> kernels;

  std::mutex test_mutex;  // of what follows; held while the self-test runs
  bool tested = false;
  const char* verdict = nullptr;

  Loaded(const Driver& driver, Context context, unsigned long long id);
};

// What the current context has loaded so far; null, and the reason, without a context.
std::shared_ptr<Loaded> Current(const Driver& driver, const char*& why);

// The current context and its id, 0 where the driver gives none. False without a context.
inline bool CurrentId(const Driver& driver, Context& context, unsigned long long& id) {
  return driver.get_context(&context) == kSuccess && context &&
         (!driver.get_id || driver.get_id(context, &id) == kSuccess);
}

// Forgets what a context had loaded, so that the next call loads again.
void Forget(const std::shared_ptr<Loaded>& loaded);

// The kernel of a launch, loaded if it is not there yet, which no stream may be captured for.
const char* FindKernel(const Driver& driver, Loaded& loaded, const QeLaunch& launch, void* stream, Kernel& found);

// Finds out whether kernels of clusters are there, for which their module is loaded. Stays unknown while a stream is captured.
void AskForClusters(const Driver& driver, Loaded& loaded, void* stream);

}  // namespace qe
