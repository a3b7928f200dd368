// host/driver.cpp on the stand-in driver: `check_driver SCENARIO` prints what went wrong, and nothing when all is right.
// Linked with --wrap=pthread_mutex_lock, which counts the locks of our code.
#include "driver_fixture.h"

namespace {

void MadeAnew() {
  qe::Launcher launcher;
  void* first = NewContext(0);
  EXPECT(!qe::SelfTestOnce() && !Run(launcher, Plan("main")) && !Run(launcher, Plan("main")));
  EXPECT(standin_counts().loads == 1);
  for (long round = 2; round < 5; ++round) {
    standin_destroy(first);
    EXPECT(standin_counts().allocated == 0);
    EXPECT(NewContext(0) == first);
    if (round == 3) EXPECT(!qe::SelfTestOnce());
    EXPECT(!Run(launcher, Plan("main", 64 << 10)) && !Run(launcher, Plan("other")));
    EXPECT(standin_counts().loads == round);
    EXPECT(launcher.counters() && AreZero(launcher.counters()) && standin_counts().allocated == 1);
  }
  EXPECT(standin_counts().dead_launches == 0 && standin_counts().launches == 6 + 3 * 4 + 2);
  EXPECT(standin_counts().dead_memory == 0);
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
  standin_fail_allocations(1);
  qe::Launcher launcher;  // asks once, so that its plans stay the same
  EXPECT(!Run(launcher, Plan("main")) && !Run(launcher, Plan("main")));
  EXPECT(!launcher.counters() && launcher.without_counters() && standin_counts().allocated == 0);
}

void TwoContexts() {
  void *one = standin_create(0), *two = standin_create(1);
  {
    qe::Launcher launchers[2], wanderer;
    for (const int i : {0, 1, 0, 1}) {
      standin_make_current(i ? two : one);
      EXPECT(!Run(launchers[i], Plan("main")) && !Run(wanderer, Plan("main")));
      EXPECT(launchers[i].multiprocessors() == 100 + i && wanderer.multiprocessors() == 100 + i);
    }
    EXPECT(standin_counts().loads == 2 && standin_counts().dead_launches == 0);
    standin_destroy(one);
    standin_make_current(two);
    EXPECT(!Run(launchers[1], Plan("main")) && standin_counts().loads == 2);
  }
  EXPECT(standin_counts().dead_memory == 0);
}

// Their destructor finds the context alive and not current, or destroyed, or made anew.
void Destroyed() {
  void *one = NewContext(0), *two = standin_create(1);
  std::optional<qe::Launcher> a, b, c;
  EXPECT(!Run(a.emplace(), Plan("main")) && !Run(b.emplace(), Plan("main")) && !Run(c.emplace(), Plan("main")));
  EXPECT(standin_counts().allocated == 3);
  standin_capture(kStream, 1);
  a.reset();
  standin_capture(kStream, 0);
  EXPECT(standin_counts().allocated == 2 && standin_counts().spoilt_captures == 0);
  if (standin_has_ids()) {
    standin_make_current(two);
    b.reset();
    EXPECT(standin_counts().allocated == 1);
    qe::Launcher still;
    EXPECT(!Run(still, Plan("main")) && still.multiprocessors() == 101);  // `two` is still current
  }
  standin_destroy(one);
  NewContext(0);
  b.reset();
  c.reset();
  EXPECT(standin_counts().allocated == 0 && standin_counts().dead_memory == 0);
}

void TwoThreads() {
  void *one = standin_create(0), *two = standin_create(1);
  standin_make_current(two);
  qe::Launcher launcher;
  EXPECT(!Run(launcher, Plan("main")));
  standin_wait_in_load(1);
  std::thread other([&] {  // loads, and waits meanwhile until the context `two` has launched
    standin_make_current(one);
    qe::Launcher another;
    EXPECT(!Run(another, Plan("main")));
  });
  while (standin_counts().loads < 2) std::this_thread::yield();
  EXPECT(!Run(launcher, Plan("main")));
  other.join();
  EXPECT(standin_counts().timeouts == 0 && standin_counts().dead_launches == 0 && standin_counts().launches == 6);
}

// One context: a launcher that has its kernels does not wait for another that loads some.
void LoadsAside() {
  void* context = NewContext(0);
  qe::Launcher launcher;
  EXPECT(!Run(launcher, Plan("main")));
  standin_wait_in_lookup(1);
  const long before = standin_counts().lookups;
  std::thread other([&] {
    standin_make_current(context);
    qe::Launcher another;
    EXPECT(!Run(another, Plan("other")));
  });
  while (standin_counts().lookups == before) std::this_thread::yield();
  EXPECT(!Run(launcher, Plan("main")));
  other.join();
  EXPECT(standin_counts().timeouts == 0 && standin_counts().launches == 6);
}

void OneContextManyThreads() {
  void* context = standin_create(0);
  std::thread threads[4];
  for (std::thread& thread : threads)
    thread = std::thread([&] {
      standin_make_current(context);
      qe::Launcher launcher;
      for (int i = 0; i < 50; ++i)
        if (qe::SelfTestOnce() || Run(launcher, Plan(i % 2 ? "main" : "other"))) printf("a thread failed\n");
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT(standin_counts().loads == 1 && standin_counts().launches == 402 && self_tests == 1);
  EXPECT(standin_counts().allocated == 0);
}

void Capture() {
  NewContext(0);
  qe::Launcher launcher;
  standin_capture(kStream, 1);
  const char* why = Run(launcher, Plan("main"));
  EXPECT(why && strstr(why, "captured") && strstr(why, "Run the engine once"));
  why = qe::SelfTestOnce();
  EXPECT(why && strstr(why, "captured") && self_tests == 0);
  launcher.Enter(kCounterBytes, nullptr);
  EXPECT(launcher.Load(Plan("main"), nullptr));
  EXPECT(standin_counts().spoilt_captures == 0 && standin_counts().loads == 0 && standin_counts().launches == 0);
  standin_capture(kStream, 0);
  EXPECT(!qe::SelfTestOnce());
  launcher.Enter(kCounterBytes, nullptr);
  EXPECT(!launcher.Load(Plan("main", 64 << 10), nullptr));
  const uint64_t counters = launcher.counters();
  standin_capture(kStream, 1);
  EXPECT(!Run(launcher, Plan("main", 64 << 10)) && !qe::SelfTestOnce());
  EXPECT(Run(launcher, Plan("other")));           // not loaded ahead
  EXPECT(Run(launcher, Plan("main", 96 << 10)));  // needs more shared memory than it was given
  EXPECT(standin_counts().spoilt_captures == 0 && standin_counts().launches == 4);
  EXPECT(standin_counts().overlapped == (standin_has_ids() ? 2 : 0));
  qe::Launcher late;  // all its kernels are there, but no memory for counters can be had
  why = Run(late, Plan("main"));
  EXPECT(why && strstr(why, "captured") && standin_counts().spoilt_captures == 0);
  standin_capture(kStream, 0);
  EXPECT(!Run(launcher, Plan("other")) && !Run(launcher, Plan("main", 96 << 10)) && !Run(late, Plan("main")));
  EXPECT(launcher.counters() == counters && AreZero(counters));
}

void NoContext() {
  qe::Launcher launcher;
  EXPECT(launcher.Run(Plan("main"), kStream));  // without Enter
  EXPECT(Run(launcher, Plan("main")) && !qe::SelfTestOnce());
  EXPECT(launcher.Load(Plan("main"), nullptr));
  EXPECT(standin_counts().loads == 0 && launcher.multiprocessors() == 0 && !launcher.counters());
}

// After its first plans, a launcher takes no lock, looks up no name and asks for no attribute.
void Steady() {
  NewContext(0);
  qe::Launcher launcher;
  const QePlan plans[] = {Plan("main", 64 << 10, 3), Plan("lone", 1024, 1), Plan("gemm"), Plan("main", 64 << 10)};
  for (const QePlan& plan : plans) EXPECT(!Run(launcher, plan));
  const StandinCounts before = standin_counts();
  const long locks_before = locks;
  EXPECT(locks_before > 0 && before.lookups > 0 && before.attributes > 0);
  for (int i = 0; i < 1000; ++i)
    if (Run(launcher, plans[i % 4])) EXPECT(false);
  EXPECT(locks == locks_before);
  const StandinCounts after = standin_counts();
  EXPECT(after.lookups - before.lookups == (standin_has_ids() ? 0 : 1000));  // how an old driver says who is current
  EXPECT(after.attributes == before.attributes && after.loads == 1);
  EXPECT(after.launches - before.launches == 250 * (3 + 1 + 2 + 2));
}

// Exactly the launches that may overlap do so, on chips and drivers and with code that know how.
void Overlaps() {
  QePlan plan = Plan("main", 1024, 3);
  plan.launch[1].overlaps = 0;
  constexpr struct {
    int capability, ptx_version;
    long expected;
  } kChips[] = {{90, 90, 1}, {120, 90, 1}, {89, 80, 0}, {80, 80, 0}, {90, 80, 0}, {100, 80, 0}, {89, 90, 0}};
  long expected = 0;
  for (const auto& chip : kChips) {
    standin_chip(chip.capability, chip.ptx_version);
    void* context = NewContext(0);
    qe::Launcher launcher;
    EXPECT(!Run(launcher, plan) && !Run(launcher, plan));
    expected += standin_has_ids() ? 2 * chip.expected : 0;
    EXPECT(standin_counts().overlapped == expected && standin_overlapped("main") == expected);
    standin_destroy(context);
  }
  EXPECT(standin_counts().launches == 7 * 6 && standin_counts().dead_memory == 0);
}

QePlan ClusterPlan(unsigned blocks, bool overlaps) {
  QePlan plan = Plan("qe_cluster_s8_c_f16", 1024, 1);
  plan.launch[0].grid_x = 2 * blocks, plan.launch[0].cluster = blocks, plan.launch[0].overlaps = overlaps;
  return plan;
}

// A context has clusters where its chip, its driver and its code know them. Their launches may overlap besides.
void Clusters() {
  constexpr struct {
    int capability, ptx_version;
    bool has;
  } kChips[] = {{90, 90, true}, {120, 90, true}, {89, 80, false}, {80, 80, false}, {90, 80, false}, {89, 90, false}};
  StandinCounts expected;
  for (const auto& chip : kChips) {
    standin_chip(chip.capability, chip.ptx_version);
    void* context = NewContext(0);
    qe::Launcher launcher;
    EXPECT(!launcher.clusters());  // nobody asked yet
    EXPECT(!Run(launcher, Plan("main")));
    EXPECT(launcher.clusters() == (chip.has && standin_has_ids()));
    if (launcher.clusters()) {
      for (const unsigned blocks : {2u, 8u})
        for (const bool overlaps : {true, false}) {
          EXPECT(!Run(launcher, ClusterPlan(blocks, overlaps)));
          ++expected.clusters, expected.overlapped += overlaps;
        }
      ++expected.overlapped;  // of the plan with `main`
    }
    EXPECT(standin_counts().clusters == expected.clusters && standin_counts().overlapped == expected.overlapped);
    standin_destroy(context);
  }
  EXPECT(expected.clusters == (standin_has_ids() ? 8 : 0) && standin_counts().dead_memory == 0);
  standin_chip(90, 90);
  for (const int blocks : {0, 4, 8, 16}) {  // a part of a GPU may have too few multiprocessors beside each other
    standin_largest_cluster(blocks);
    void* context = NewContext(0);
    qe::Launcher launcher;
    EXPECT(!Run(launcher, Plan("main")));
    EXPECT(launcher.clusters() == (blocks >= 8 && standin_has_ids()));
    standin_destroy(context);
  }
}

// While a stream is captured nobody asks, and a plan has none; what is known stays known. A launcher that goes from one
// context to another has what that one has.
void ClustersOfContexts() {
  void *one = NewContext(0), *two = standin_create(1);
  qe::Launcher launcher, second;
  standin_capture(kStream, 1);
  launcher.Enter(0, kStream);
  EXPECT(!launcher.clusters() && standin_counts().loads == 0 && standin_counts().lookups == 0);
  standin_capture(kStream, 0);
  const QePlan plan = ClusterPlan(4, true);
  const bool has = standin_has_ids();
  launcher.Enter(0, kStream);
  EXPECT(launcher.clusters() == has);
  if (has) EXPECT(!launcher.Load(plan, kStream));
  standin_capture(kStream, 1);
  for (qe::Launcher* each : {&launcher, &second}) {
    each->Enter(0, kStream);
    EXPECT(each->clusters() == has);
    if (has) EXPECT(!each->Run(plan, kStream));
  }
  EXPECT(standin_counts().clusters == (has ? 2 : 0) && standin_counts().spoilt_captures == 0);
  standin_capture(kStream, 0);
  standin_make_current(two);
  standin_chip(80, 80);
  launcher.Enter(0, kStream);
  EXPECT(!launcher.clusters() && !launcher.Run(Plan("main"), kStream));
  standin_make_current(one);
  standin_chip(90, 90);
  launcher.Enter(0, kStream);
  EXPECT(launcher.clusters() == has);
  if (has) EXPECT(!launcher.Run(plan, kStream));
  EXPECT(standin_counts().clusters == (has ? 3 : 0) && standin_counts().dead_launches == 0);
}

void Counters() {
  NewContext(0);
  void* const stream_that_waits_for_nobody = reinterpret_cast<void*>(128);
  qe::Launcher one, two, none;
  EXPECT(!Run(one, Plan("main")) && !Run(two, Plan("main"), stream_that_waits_for_nobody));
  const uint64_t counters = one.counters();
  EXPECT(counters && AreZero(counters) && two.counters() && two.counters() != counters && AreZero(two.counters()));
  for (const char* kernel : {"other", "gemm", "main"}) EXPECT(!Run(one, Plan(kernel)) && one.counters() == counters);
  none.Enter(0, kStream);
  EXPECT(!none.Run(Plan("main"), kStream) && !none.counters() && !none.without_counters());
  EXPECT(standin_counts().allocated == 2);

  // A plan that stops half way leaves anything behind.
  standin_fail_launch(2);
  EXPECT(Run(one, Plan("main")));
  memset(reinterpret_cast<void*>(counters), 1, kCounterBytes);
  standin_capture(kStream, 1);
  EXPECT(!Run(one, Plan("main")) && !AreZero(counters));  // the graph will zero them, but has not run
  standin_capture(kStream, 0);
  EXPECT(!Run(one, Plan("main")) && AreZero(counters) && one.counters() == counters);
  memset(reinterpret_cast<void*>(counters), 1, kCounterBytes);
  EXPECT(!Run(one, Plan("main")) && !AreZero(counters));  // kernels leave zeros: nobody zeroes them for each plan
  EXPECT(standin_counts().spoilt_captures == 0 && standin_counts().dead_memory == 0);
}

constexpr struct {
  const char* name;
  void (*run)();
} kScenarios[] = {{"made_anew", MadeAnew},       {"tested_again", TestedAgain}, {"no_memory", NoMemory},
                  {"two_contexts", TwoContexts}, {"destroyed", Destroyed},      {"two_threads", TwoThreads},
                  {"loads_aside", LoadsAside},   {"many_threads", OneContextManyThreads},
                  {"capture", Capture},          {"no_context", NoContext},     {"steady", Steady},
                  {"overlaps", Overlaps},        {"counters", Counters},      {"clusters", Clusters},
                  {"clusters_of_contexts", ClustersOfContexts}};

}  // namespace

int main(int argc, char** argv) {
  for (const auto& scenario : kScenarios)
    if (argc == 2 && !strcmp(argv[1], scenario.name)) return scenario.run(), failures != 0;
  return printf("There is no such scenario.\n"), 2;
}
