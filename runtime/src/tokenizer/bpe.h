#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/json.h"

namespace qe_edge {

using TokenId = int32_t;

// Byte pair encoding as the library `tokenizers` does it.
class Bpe {
 public:
  explicit Bpe(const Json& model);

  // Appends the ids of a piece.
  void Encode(std::string_view piece, std::vector<TokenId>& ids) const;

  TokenId Find(const std::string& token) const;       // -1: no such token
  const std::string* Text(TokenId id) const;          // nullptr: no such id

 private:
  struct Merge {
    int32_t rank;
    TokenId id;
  };

  void ReadMerges(const Json& merges);
  std::vector<TokenId> Characters(std::string_view piece) const;
  const Merge* FindMerge(TokenId left, TokenId right) const;

  std::unordered_map<std::string, TokenId> ids_;
  std::unordered_map<TokenId, std::string> texts_;
  std::unordered_map<uint64_t, Merge> merges_;
  std::string unknown_;
  bool fuse_unknown_, byte_fallback_, ignore_merges_;
};

}  // namespace qe_edge
