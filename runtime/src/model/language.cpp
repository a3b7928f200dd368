#include "model/language.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "model/folder.h"

namespace qe_edge {
namespace {

std::string OutputOf(const std::string& name) { return kPresent + name.substr(std::strlen(kPast)); }

Tensor Numbers(std::vector<int64_t> shape, int64_t value) {
  Tensor tensor = Zeros("int64", std::move(shape));
  std::fill_n(tensor.As<int64_t>(), tensor.Count(), value);
  return tensor;
}

}  // namespace

Language::Language(std::shared_ptr<const Core> core, int64_t capacity) : core_(std::move(core)), capacity_(capacity) {
  const Graph& graph = core_->language();
  for (const TensorSpec& spec : core_->manifest.graphs.at("language").inputs) {
    if (spec.name.rfind(kPast, 0) != 0) continue;
    const bool state = IsState(spec.name);
    std::vector<int64_t> shape = spec.shape;
    shape[0] = 1;
    if (!state) shape[2] = capacity;
    if (state) states_.push_back(spec.name);
    past_[spec.name] = graph.Kept(spec.dtype, shape);
    const bool in_place = !state && core_->manifest.kv_in_place;
    if (!in_place) turned_.push_back(spec.name);
    present_[OutputOf(spec.name)] = in_place ? past_[spec.name] : graph.Kept(spec.dtype, shape);
  }
}

// How many tokens of the prompt need not be fed. A state stands for all tokens that were, so that it is of use for all of
// them or for none.
size_t Language::Shared(const Prompt& prompt) const {
  size_t count = 0;
  while (count + 1 < prompt.size() && count < held_.size() && prompt[count].Same(held_[count])) ++count;
  return states_.empty() || count == held_.size() ? count : 0;
}

// How many tokens behind the first `start` one call reads. Engines read as many as their prompt has, and one by one what
// comes behind; ONNX Runtime reads any number.
size_t Language::AtOnce(size_t start, size_t end) const {
  const auto& limits = core_->manifest.limits;
  if (!limits || static_cast<int64_t>(end) <= limits->prompt) return end - start;
  if (start > 0) return 1;
  const std::string size = std::to_string(end);
  throw InputError("These engines do not take a prompt of " + size + " tokens: they were built for " + std::to_string(limits->prompt) + ".",
                   "Use a smaller picture or prompt, or build them with --max-prompt " + size + ".");
}

Tensor Language::Embeds(const Prompt& prompt, size_t start, size_t end) const {
  const int64_t width = core_->manifest.EmbedsWidth();
  Tensor embeds = Zeros("float32", {1, static_cast<int64_t>(end - start), width});
  for (size_t index = start; index < end; ++index) {
    const PromptToken& token = prompt[index];
    float* row = embeds.As<float>() + static_cast<int64_t>(index - start) * width;
    if (token.feature < 0) core_->embedding.Copy(token.id, row);
    else std::copy_n(token.picture->features.As<float>() + token.feature * width, width, row);
  }
  return embeds;
}

Tensor Language::Positions(const Prompt& prompt, size_t start, size_t end) const {
  const int64_t axes = core_->manifest.PositionAxes(), count = static_cast<int64_t>(end - start);
  Tensor positions = Zeros("int64", {axes, 1, count});
  for (int64_t axis = 0; axis < axes; ++axis) {
    for (int64_t index = 0; index < count; ++index)
      positions.As<int64_t>()[axis * count + index] = prompt[start + static_cast<size_t>(index)].position[axis];
  }
  if (axes == 1) positions.shape = {1, count};
  return positions;
}

// Feeds the tokens from `start` to `end`; returns the logits of the last one.
Tensor Language::Call(const Prompt& prompt, size_t start, size_t end) {
  Tensors inputs = past_;
  inputs["inputs_embeds"] = Embeds(prompt, start, end);
  inputs["position_ids"] = Positions(prompt, start, end);
  inputs["attention_mask"] = Numbers({1, static_cast<int64_t>(end)}, 1);
  inputs["logit_positions"] = Numbers({1, 1}, static_cast<int64_t>(end - start) - 1);
  const Tensors outputs = core_->language().Run(inputs, present_);
  const auto logits = outputs.find("logits");
  if (logits == outputs.end() || logits->second.dtype != "float32" || logits->second.Count() != core_->manifest.vocab_size)
    throw ArtifactError("The graph 'language' computes other logits than the manifest says.", kAgain);
  for (const std::string& name : turned_) std::swap(past_[name], present_[OutputOf(name)]);
  held_.insert(held_.end(), prompt.begin() + static_cast<std::ptrdiff_t>(start), prompt.begin() + static_cast<std::ptrdiff_t>(end));
  return logits->second;
}

std::vector<float> Language::Read(const Prompt& prompt) {
  if (prompt.empty()) throw InputError("There is nothing to answer.", "Give at least one token of text.");
  if (static_cast<int64_t>(prompt.size()) > capacity_)
    throw InputError("The context of " + std::to_string(capacity_) + " tokens is full.", "Ask for a shorter answer.");
  const size_t start = Shared(prompt), step = AtOnce(start, prompt.size());
  held_.resize(start);  // what a failed call has written is not read
  if (start == 0) {
    for (const std::string& name : states_) {
      Tensor& state = past_[name];
      state = core_->language().Kept(state.dtype, state.shape);
    }
  }
  reused_ = start;
  Tensor logits;
  for (size_t next = start; next < prompt.size(); next += step) logits = Call(prompt, next, next + step);
  const auto* first = logits.As<float>();
  std::vector<float> values(first, first + logits.Count());
  if (!std::all_of(values.begin(), values.end(), [](float value) { return std::isfinite(value); })) {
    throw Error(QE_ERROR_ARTIFACT, "The logits of the engine are not finite: they hold NaN or infinity.",
                "Check the original model's weights with 'qe-edge validate'.");
  }
  return values;
}

}  // namespace qe_edge
