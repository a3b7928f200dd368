#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/added_tokens.h"
#include "tokenizer/bpe.h"
#include "tokenizer/steps.h"

namespace qe_edge {

// A tokenizer.json: texts to ids and back, with the ids that the library `tokenizers` gives. Threads may share one.
class Tokenizer {
 public:
  // `where` names the file in messages. Throws ArtifactError if it is damaged, or has a step that C++ does not have.
  Tokenizer(std::string_view json, const std::string& where);

  // Ids of valid UTF-8; throws InputError for anything else. `special_as_text`: special tokens in it are text.
  // `frame`: the tokenizer puts its own special tokens around it.
  std::vector<TokenId> Encode(std::string_view text, bool special_as_text = false, bool frame = false) const;

  // Text of ids without special tokens. Bytes that are no UTF-8 become U+FFFD.
  std::string Decode(const std::vector<TokenId>& ids) const;

  // Whether the text may change its end once more tokens follow: its last character is not complete.
  bool EndsOpen(const std::vector<TokenId>& ids) const;

  const AddedTokens& added() const { return added_; }
  TokenId Find(const std::string& token) const;

 private:
  struct Frame {
    std::vector<TokenId> before, after;
  };

  Tokenizer(const Json& table);
  static Frame ReadFrame(const Json& step, int depth);
  void EncodeText(Piece piece, std::vector<TokenId>& ids) const;
  const std::string* Text(TokenId id) const;

  Normalizer normalizer_;
  AddedTokens added_;
  PreTokenizer pre_tokenizer_;
  Bpe model_;
  Decoder decoder_;
  Frame frame_;
  bool byte_level_;
};

// Text of an answer that grows: each step gives what can no longer change. The pieces together are what all ids give.
class TextStream {
 public:
  explicit TextStream(std::shared_ptr<const Tokenizer> tokenizer) : tokenizer_(std::move(tokenizer)) {}

  std::string Add(TokenId id);  // empty while a character is incomplete
  std::string Finish();         // the rest

 private:
  std::string Advance(bool finish);

  std::shared_ptr<const Tokenizer> tokenizer_;
  std::vector<TokenId> ids_;  // of the last piece, and of what came after it
  size_t given_ = 0;          // how many of them are the last piece's
};

}  // namespace qe_edge
