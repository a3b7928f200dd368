#pragma once

#include <memory>
#include <vector>

#include "model/core.h"

namespace qe_edge {

using PicturePointer = std::shared_ptr<const PictureTokens>;

// A token of a prompt with where it stands and, for image tokens, what the model sees in its place.
struct PromptToken {
  int64_t id;
  int64_t position[3];
  PicturePointer picture;  // whose token it is; null for text
  int64_t feature;         // row of the picture's features; -1 for a token that is embedded

  // Whether the model reads the same: then its keys and values are the same after the same tokens.
  bool Same(const PromptToken& other) const;
};

using Prompt = std::vector<PromptToken>;

// A prompt of token ids, each placeholder of them replaced by its picture's tokens, in order.
// Throws InputError if there are more or fewer pictures than placeholders.
Prompt MakePrompt(const Core& core, const std::vector<TokenId>& ids, const std::vector<PicturePointer>& pictures);

// A token of an answer, which stands after the others.
PromptToken NextToken(const Prompt& prompt, int64_t id);

}  // namespace qe_edge
