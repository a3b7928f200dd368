#include "model/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <unordered_set>

namespace qe_edge {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

struct Candidate {
  double score;
  int64_t id;
};

// Tokens after which a sequence of the answer would come a second time.
void RefuseRepeated(const std::vector<int64_t>& tokens, size_t size, std::vector<float>& logits) {
  if (size == 0 || tokens.size() < size) return;
  const auto tail = tokens.end() - static_cast<std::ptrdiff_t>(size - 1);
  for (size_t start = 0; start + size <= tokens.size(); ++start) {
    const int64_t next = tokens[start + size - 1];
    if (std::equal(tail, tokens.end(), tokens.begin() + static_cast<std::ptrdiff_t>(start)) &&
        next < static_cast<int64_t>(logits.size()))
      logits[static_cast<size_t>(next)] = kNever;
  }
}

int64_t Argmax(const std::vector<float>& logits) {
  return std::max_element(logits.begin(), logits.end()) - logits.begin();
}

}  // namespace

double Random::Next() {
  state_ += 0x9E3779B97F4A7C15;
  uint64_t mixed = state_;
  mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9;
  mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB;
  return static_cast<double>((mixed ^ (mixed >> 31)) >> 11) * 0x1p-53;
}

void AdjustLogits(const GenerationSettings& settings, const std::vector<int64_t>& tokens, int64_t fresh,
                  std::vector<float>& logits) {
  const auto forbid = [&](const std::vector<int64_t>& ids) {
    for (const int64_t id : ids) logits[static_cast<size_t>(id)] = kNever;
  };
  const auto penalty = static_cast<float>(settings.repetition_penalty);
  if (penalty != 1) {
    for (const int64_t id : std::unordered_set<int64_t>(tokens.begin(), tokens.end())) {
      if (id >= static_cast<int64_t>(logits.size())) continue;
      float& score = logits[static_cast<size_t>(id)];
      score = score < 0 ? score * penalty : score / penalty;
    }
  }
  RefuseRepeated(tokens, static_cast<size_t>(settings.no_repeat_ngram_size), logits);
  if (static_cast<int64_t>(tokens.size()) < settings.min_length || fresh < settings.min_new_tokens)
    forbid(settings.eos_token_ids);
  forbid(settings.suppress_tokens);
  if (fresh == 0) forbid(settings.begin_suppress_tokens);
}

int64_t ChooseToken(const std::vector<float>& logits, const Sampling& sampling, Random& random) {
  const int64_t likeliest = Argmax(logits);
  // a temperature next to 0 makes scores infinite: then the most likely token is taken
  if (sampling.temperature == 0 || !std::isfinite(logits[static_cast<size_t>(likeliest)] / sampling.temperature))
    return likeliest;
  std::vector<Candidate> kept;
  for (size_t id = 0; id < logits.size(); ++id) {
    const double score = static_cast<double>(logits[id]) / sampling.temperature;
    if (score > -std::numeric_limits<double>::infinity()) kept.push_back({score, static_cast<int64_t>(id)});
  }
  const auto better = [](const Candidate& a, const Candidate& b) { return a.score > b.score; };
  const auto top = static_cast<size_t>(sampling.top_k);
  if (top > 0 && top < kept.size()) {
    std::vector<Candidate> ordered = kept;
    std::nth_element(ordered.begin(), ordered.begin() + static_cast<std::ptrdiff_t>(top - 1), ordered.end(), better);
    const double lowest = ordered[top - 1].score;
    kept.erase(std::remove_if(kept.begin(), kept.end(), [&](const Candidate& c) { return c.score < lowest; }), kept.end());
  }
  std::stable_sort(kept.begin(), kept.end(), better);  // equal ones stay in the order of their ids
  std::vector<double> weights(kept.size()), before(kept.size());
  double total = 0;
  for (size_t i = 0; i < kept.size(); ++i) {
    weights[i] = std::exp(kept[i].score - kept[0].score);
    before[i] = total += weights[i];
  }
  size_t count = 1;
  while (count < kept.size() && before[count - 1] < sampling.top_p * total) ++count;
  count = static_cast<size_t>(std::count_if(weights.begin(), weights.begin() + static_cast<std::ptrdiff_t>(count),
                                            [&](double weight) { return weight >= sampling.min_p; }));
  const double place = random.Next() * before[count - 1];
  const auto found = std::upper_bound(before.begin(), before.begin() + static_cast<std::ptrdiff_t>(count), place);
  return kept[std::min(static_cast<size_t>(found - before.begin()), count - 1)].id;
}

}  // namespace qe_edge
