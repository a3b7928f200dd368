#include "model/prompt.h"

#include <algorithm>

namespace qe_edge {
namespace {

int64_t After(const Prompt& prompt) {
  int64_t next = 0;
  // positions of a picture's tokens do not grow from token to token
  for (size_t index = prompt.size(); index-- > 0;) {
    const PromptToken& token = prompt[index];
    next = std::max(next, 1 + *std::max_element(token.position, token.position + 3));
    if (token.picture == nullptr || (index > 0 && prompt[index - 1].picture == nullptr)) break;
  }
  return next;
}

void AddPicture(const Core& core, const PicturePointer& picture, Prompt& prompt) {
  const int64_t start = After(prompt), axes = picture->positions.shape[0];
  const auto count = static_cast<int64_t>(picture->ids.size());
  const auto* places = picture->positions.As<int64_t>();
  int64_t feature = 0;
  for (int64_t index = 0; index < count; ++index) {
    PromptToken token{picture->ids[static_cast<size_t>(index)], {}, picture, -1};
    if (token.id == core.manifest.image_token_id) token.feature = feature++;
    for (int64_t axis = 0; axis < 3; ++axis)
      token.position[axis] = start + places[std::min(axis, axes - 1) * count + index];
    prompt.push_back(std::move(token));
  }
}

}  // namespace

bool PromptToken::Same(const PromptToken& other) const {
  const bool placed = std::equal(position, position + 3, other.position);
  const bool seen = feature == other.feature && (feature < 0 || picture == other.picture || picture->key == other.picture->key);
  return id == other.id && placed && seen;
}

Prompt MakePrompt(const Core& core, const std::vector<TokenId>& ids, const std::vector<PicturePointer>& pictures) {
  const int64_t placeholder = core.manifest.picture ? core.manifest.picture->placeholder_id : -1;
  const auto places = static_cast<size_t>(std::count(ids.begin(), ids.end(), placeholder));
  if (places != pictures.size()) {
    throw InputError("The prompt has places for " + std::to_string(places) + " pictures and there are " +
                         std::to_string(pictures.size()) + ".", "Give a picture for every place.");
  }
  Prompt prompt;
  size_t next = 0;
  for (const TokenId id : ids) {
    if (id != placeholder) {
      prompt.push_back(NextToken(prompt, id));
      continue;
    }
    if (const auto& label = core.manifest.picture->label) {
      for (const int64_t said : label->Ids(next)) prompt.push_back(NextToken(prompt, said));
    }
    AddPicture(core, pictures[next++], prompt);
  }
  return prompt;
}

PromptToken NextToken(const Prompt& prompt, int64_t id) {
  const int64_t place = After(prompt);
  return {id, {place, place, place}, nullptr, -1};
}

}  // namespace qe_edge
