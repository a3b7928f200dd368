#pragma once

#include <cstdint>
#include <vector>

#include "model/manifest.h"

namespace qe_edge {

// How a token is chosen, as qe_edge/runtime/sampling.py says. Temperature 0 takes the most likely token.
struct Sampling {
  double temperature = 0;
  int64_t top_k = 0;
  double top_p = 1, min_p = 0;
};

// Numbers in [0, 1) with 53 bits: splitmix64, whose state starts at the seed.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  double Next();

 private:
  uint64_t state_;
};

// Changes logits of the next token by the settings' rules, in the order of transformers. `tokens`: prompt and answer so
// far; `fresh`: tokens of the answer so far. What must not come becomes -inf.
void AdjustLogits(const GenerationSettings& settings, const std::vector<int64_t>& tokens, int64_t fresh,
                  std::vector<float>& logits);

// The next token; the lowest id of those that are equally likely at temperature 0.
int64_t ChooseToken(const std::vector<float>& logits, const Sampling& sampling, Random& random);

}  // namespace qe_edge
