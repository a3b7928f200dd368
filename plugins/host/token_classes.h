// What any number of tokens needs.
#pragma once
#include <algorithm>

#include "../include/qe_edge/plan.h"

namespace qe {

// Numbers of tokens: powers of two, and one more. Plans change their kernels only between these two, and in between
// counters only grow.
template <class Do>
void ForTokenClasses(QeProblem problem, Do with) {
  for (int32_t power = 1; power <= 1 << 14; power *= 2)
    for (const int32_t tokens : {power, power + 1}) {
      problem.M = tokens;
      with(problem);
    }
}

inline size_t MostCounterBytes(const QeProblem& problem) {
  size_t most = 0;
  ForTokenClasses(problem, [&](const QeProblem& p) { most = std::max(most, QeCounterBytes(&p)); });
  return most;
}

}  // namespace qe
