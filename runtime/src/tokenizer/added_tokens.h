#pragma once

#include <map>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "base/json.h"
#include "tokenizer/bpe.h"
#include "tokenizer/steps.h"

namespace qe_edge {

// A part of a text: an added token, or text (id -1).
struct Part {
  size_t start, end;
  TokenId id;
};

// Tokens of a tokenizer.json that are found in a text before anything else.
class AddedTokens {
 public:
  AddedTokens(const Json& table, const Normalizer& normalizer);

  // The parts of a text. `normalized` chooses the tokens that are looked for in normalized text.
  // With `special_as_text`, special tokens are not looked for.
  std::vector<Part> Split(std::string_view text, bool normalized, bool special_as_text) const;

  const std::string* Text(TokenId id) const;  // nullptr: not an added token
  bool IsSpecial(const std::string& text) const { return special_.count(text) > 0; }
  const std::unordered_set<std::string>& special() const { return special_; }
  TokenId Find(const std::string& text) const;  // -1: not an added token

 private:
  struct Token {
    TokenId id;
    std::string content, text;
    bool single_word, left_strip, right_strip, special;
  };

  const Token* Longest(std::string_view text, size_t offset, bool normalized, size_t& length) const;

  std::vector<Token> tokens_;
  std::unordered_map<TokenId, size_t> by_id_;
  std::unordered_map<std::string, TokenId> ids_;
  std::unordered_set<std::string> special_;
  std::map<std::string, size_t, std::less<>> patterns_[2];  // of raw and of normalized text
  std::vector<size_t> lengths_[2][256];                     // of the patterns by first byte, the longest first
};

}  // namespace qe_edge
