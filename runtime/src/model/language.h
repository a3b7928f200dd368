#pragma once

#include <string>
#include <vector>

#include "model/prompt.h"

namespace qe_edge {

// The language model over a cache of its own: keys and values, written in place or into a second buffer, and states of fixed
// size. One thread at a time.
class Language {
 public:
  Language(std::shared_ptr<const Core> core, int64_t capacity);

  // Brings the cache to hold `prompt` and returns the logits of its last token. Tokens that it holds already are not
  // fed again; a cache with states is read anew unless it holds a beginning of the prompt and nothing more. Throws an Error
  // if they do not fit, or logits are not finite.
  std::vector<float> Read(const Prompt& prompt);

  int64_t capacity() const { return capacity_; }
  size_t reused() const { return reused_; }  // tokens that the last `Read` found in the cache

 private:
  size_t Shared(const Prompt& prompt) const;
  size_t AtOnce(size_t start, size_t end) const;
  Tensor Embeds(const Prompt& prompt, size_t start, size_t end) const;
  Tensor Positions(const Prompt& prompt, size_t start, size_t end) const;
  Tensor Call(const Prompt& prompt, size_t start, size_t end);

  std::shared_ptr<const Core> core_;
  int64_t capacity_;
  Tensors past_, present_;  // written in place: the same buffers under two names; else two buffers, in turn
  std::vector<std::string> states_;  // names of the inputs that are states
  std::vector<std::string> turned_;  // names of the inputs with two buffers
  Prompt held_;
  size_t reused_ = 0;
};

}  // namespace qe_edge
