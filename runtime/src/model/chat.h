#pragma once

#include <map>
#include <string>
#include <vector>

#include "tokenizer/tokenizer.h"

namespace qe_edge {

// What one side said: text, with the places of pictures in it as byte offsets, in order.
struct Turn {
  std::string role, text;
  std::vector<size_t> marks;
};

// A part of a prompt. In the template's own text special tokens count; in a user's they are text.
struct ChatPiece {
  std::string text;
  bool trusted;
};

// chat.json: the chat template in parts, as qe_edge/runtime/chat_segments.py reads it.
class Chat {
 public:
  // Throws ArtifactError for a file that is damaged or of another version. `where` names it.
  Chat(const std::string& json, const std::string& where);

  // A conversation up to where the assistant answers. Throws InputError if the template has no place for a turn.
  std::vector<ChatPiece> Pieces(const std::vector<Turn>& turns) const;

 private:
  const std::string& Joint(const std::string& before, const std::string& after) const;
  void AddContent(const Turn& turn, std::vector<ChatPiece>& pieces) const;

  std::string problem_, picture_, last_;
  bool pictures_first_ = false;
  std::map<std::string, std::map<std::string, std::string>> joints_;
  std::map<std::string, std::string> strip_;
  std::vector<std::string> refused_;
};

// Ids of a prompt, as qe_edge/models/chat.py makes them. Throws InputError where the tokenizer cannot read a special
// token that a user spells as text.
std::vector<TokenId> ChatIds(const Tokenizer& tokenizer, const std::vector<ChatPiece>& pieces);

}  // namespace qe_edge
