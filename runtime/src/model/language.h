#pragma once

#include <vector>

#include "model/prompt.h"

namespace qe_edge {

// The language model over a KV cache of its own, written in place. One thread at a time.
class Language {
 public:
  Language(std::shared_ptr<const Core> core, int64_t capacity);

  // Brings the cache to hold `prompt` and returns the logits of its last token. Tokens that it holds already are not
  // fed again. Throws an Error if they do not fit, or logits are not finite.
  std::vector<float> Read(const Prompt& prompt);

  int64_t capacity() const { return capacity_; }
  size_t reused() const { return reused_; }  // tokens that the last `Read` found in the cache

 private:
  Tensor Embeds(const Prompt& prompt, size_t start) const;
  Tensor Positions(const Prompt& prompt, size_t start) const;

  std::shared_ptr<const Core> core_;
  int64_t capacity_;
  Tensors past_, present_;  // the same buffers under two names
  Prompt held_;
  size_t reused_ = 0;
};

}  // namespace qe_edge
