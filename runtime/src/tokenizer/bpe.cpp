#include "tokenizer/bpe.h"

#include <cstdio>
#include <queue>

#include "base/text.h"
#include "tokenizer/steps.h"

namespace qe_edge {
namespace {

constexpr char kRemedy[] = "Use the original model's tokenizer.json.";
constexpr TokenId kMaxId = 1 << 24;

uint64_t Key(TokenId left, TokenId right) {
  return (static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32) | static_cast<uint32_t>(right);
}

std::string TextOr(const Json& model, const char* key) {
  const auto found = model.find(key);
  return found == model.end() || found->is_null() ? std::string() : found->get<std::string>();
}

// A symbol of a word that is being merged; `next` and `previous` are indices, -1 at the ends.
struct Symbol {
  TokenId id;
  int previous, next;
  bool alive;
};

// A merge that may be done. The lowest rank comes first, then the leftmost place.
struct Candidate {
  int32_t rank;
  int place;
  TokenId id;

  bool operator<(const Candidate& other) const {
    return rank != other.rank ? rank > other.rank : place > other.place;
  }
};

}  // namespace

Bpe::Bpe(const Json& model) : unknown_(TextOr(model, "unk_token")) {
  const std::string type = model.value("type", model.contains("merges") ? "BPE" : "");
  if (type != "BPE") {
    throw ArtifactError("The tokenizer is of type '" + Shown(type) + "', which C++ does not have.",
                        "Use a model with a BPE tokenizer, or run it from Python.");
  }
  if (!TextOr(model, "continuing_subword_prefix").empty() || !TextOr(model, "end_of_word_suffix").empty())
    throw ArtifactError("The tokenizer marks parts of words, which C++ does not have.", "Run the model from Python.");
  if (const auto dropout = model.find("dropout"); dropout != model.end() && !dropout->is_null() && *dropout != 0.0)
    throw ArtifactError("The tokenizer drops merges at random.", "Set dropout to null in tokenizer.json.");
  fuse_unknown_ = model.value("fuse_unk", false);
  byte_fallback_ = model.value("byte_fallback", false);
  ignore_merges_ = model.value("ignore_merges", false);
  for (const auto& item : model.at("vocab").items()) {
    const auto id = item.value().get<int64_t>();
    if (id < 0 || id > kMaxId) throw ArtifactError("A token of the tokenizer has number " + std::to_string(id) + ".", kRemedy);
    ids_.emplace(item.key(), static_cast<TokenId>(id));
    texts_.emplace(static_cast<TokenId>(id), item.key());
  }
  if (!unknown_.empty() && Find(unknown_) < 0)
    throw ArtifactError("The tokenizer's vocabulary lacks its unknown token '" + Shown(unknown_) + "'.", kRemedy);
  ReadMerges(model.at("merges"));
}

void Bpe::ReadMerges(const Json& merges) {
  int32_t rank = 0;
  merges_.reserve(merges.size());
  for (const Json& merge : merges) {
    std::string left, right;
    if (merge.is_string()) {
      const auto pair = merge.get<std::string>();
      const size_t space = pair.find(' ');
      if (space == std::string::npos || pair.find(' ', space + 1) != std::string::npos)
        throw ArtifactError("The tokenizer's merge '" + Shown(pair) + "' is no pair.", kRemedy);
      left = pair.substr(0, space);
      right = pair.substr(space + 1);
    } else {
      if (merge.size() != 2) throw ArtifactError("A merge of the tokenizer is no pair.", kRemedy);
      left = merge.at(0).get<std::string>();
      right = merge.at(1).get<std::string>();
    }
    const TokenId first = Find(left), second = Find(right), whole = Find(left + right);
    if (first < 0 || second < 0 || whole < 0)
      throw ArtifactError("The tokenizer merges '" + Shown(left + right) + "', which is not in its vocabulary.", kRemedy);
    merges_[Key(first, second)] = {rank++, whole};
  }
}

TokenId Bpe::Find(const std::string& token) const {
  const auto found = ids_.find(token);
  return found == ids_.end() ? -1 : found->second;
}

const std::string* Bpe::Text(TokenId id) const {
  const auto found = texts_.find(id);
  return found == texts_.end() ? nullptr : &found->second;
}

const Bpe::Merge* Bpe::FindMerge(TokenId left, TokenId right) const {
  const auto found = merges_.find(Key(left, right));
  return found == merges_.end() ? nullptr : &found->second;
}

std::vector<TokenId> Bpe::Characters(std::string_view piece) const {
  std::vector<TokenId> ids;
  bool pending = false;  // an unknown token that more characters may join
  const auto flush = [&] {
    if (pending) ids.push_back(Find(unknown_));
    pending = false;
  };
  for (size_t offset = 0; offset < piece.size();) {
    const std::string character(piece.substr(offset, CharacterBytes(static_cast<unsigned char>(piece[offset]))));
    offset += character.size();
    if (const TokenId id = Find(character); id >= 0) {
      flush();
      ids.push_back(id);
      continue;
    }
    if (byte_fallback_) {
      std::vector<TokenId> bytes;
      for (const char byte : character) {
        char name[8];
        std::snprintf(name, sizeof(name), "<0x%02X>", static_cast<unsigned char>(byte));
        if (const TokenId id = Find(name); id >= 0) bytes.push_back(id);
      }
      if (bytes.size() == character.size()) {
        ids.insert(ids.end(), bytes.begin(), bytes.end());
        continue;
      }
    }
    if (unknown_.empty()) continue;  // as `tokenizers`: what neither a token nor an unknown token covers has no ids
    if (!fuse_unknown_) flush();
    pending = true;
  }
  flush();
  return ids;
}

void Bpe::Encode(std::string_view piece, std::vector<TokenId>& ids) const {
  if (ignore_merges_) {
    if (const TokenId id = Find(std::string(piece)); id >= 0) {
      ids.push_back(id);
      return;
    }
  }
  std::vector<Symbol> symbols;
  for (const TokenId id : Characters(piece)) {
    const int index = static_cast<int>(symbols.size());
    if (index > 0) symbols.back().next = index;
    symbols.push_back({id, index - 1, -1, true});
  }
  std::priority_queue<Candidate> queue;
  const auto offer = [&](int left) {
    if (left < 0 || symbols[static_cast<size_t>(left)].next < 0) return;
    const Symbol& symbol = symbols[static_cast<size_t>(left)];
    const Merge* merge = FindMerge(symbol.id, symbols[static_cast<size_t>(symbol.next)].id);
    if (merge != nullptr) queue.push({merge->rank, left, merge->id});
  };
  for (int index = 0; index < static_cast<int>(symbols.size()); ++index) offer(index);
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    Symbol& left = symbols[static_cast<size_t>(best.place)];
    if (!left.alive || left.next < 0) continue;
    Symbol& right = symbols[static_cast<size_t>(left.next)];
    const Merge* merge = FindMerge(left.id, right.id);
    if (merge == nullptr || merge->id != best.id) continue;  // one of the two was merged since
    left.id = best.id;
    left.next = right.next;
    right.alive = false;
    if (right.next >= 0) symbols[static_cast<size_t>(right.next)].previous = best.place;
    offer(left.previous);
    offer(best.place);
  }
  for (const Symbol& symbol : symbols) {
    if (symbol.alive) ids.push_back(symbol.id);
  }
}

}  // namespace qe_edge
