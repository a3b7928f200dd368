#include "tokenizer/added_tokens.h"

#include <utf8proc.h>

#include <algorithm>

#include "base/text.h"

namespace qe_edge {
namespace {

constexpr size_t kMaxContent = 1024;  // bytes of an added token

// \w of Unicode: alphabetic, mark, decimal digit, connector, joiner.
bool IsWord(char32_t c) {
  const bool circled = (c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) ||
                       (c >= 0x1F150 && c <= 0x1F169) || (c >= 0x1F170 && c <= 0x1F189);
  if (circled || c == 0x200C || c == 0x200D) return true;
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_LU: case UTF8PROC_CATEGORY_LL: case UTF8PROC_CATEGORY_LT: case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO: case UTF8PROC_CATEGORY_MN: case UTF8PROC_CATEGORY_MC: case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND: case UTF8PROC_CATEGORY_NL: case UTF8PROC_CATEGORY_PC: return true;
    default: return false;
  }
}

// Where the character that ends at `end` starts.
size_t Before(std::string_view text, size_t end) {
  size_t start = end - 1;
  while (start > 0 && (static_cast<unsigned char>(text[start]) & 0xC0) == 0x80) --start;
  return start;
}

bool WordAt(std::string_view text, size_t offset) { return IsWord(NextCodePoint(text, offset)); }

bool StandsAlone(std::string_view text, size_t start, size_t end) {
  return (start == 0 || !WordAt(text, Before(text, start))) && (end == text.size() || !WordAt(text, end));
}

size_t SpacesBefore(std::string_view text, size_t end) {
  while (end > 0) {
    const size_t start = Before(text, end);
    size_t offset = start;
    if (!IsSpace(NextCodePoint(text, offset))) break;
    end = start;
  }
  return end;
}

size_t SpacesAfter(std::string_view text, size_t start) {
  while (start < text.size()) {
    size_t offset = start;
    if (!IsSpace(NextCodePoint(text, offset))) break;
    start = offset;
  }
  return start;
}

}  // namespace

AddedTokens::AddedTokens(const Json& table, const Normalizer& normalizer) {
  for (const Json& entry : table) {
    Token token{};
    token.id = entry.at("id").get<TokenId>();
    token.content = entry.at("content").get<std::string>();
    token.single_word = entry.value("single_word", false);
    token.left_strip = entry.value("lstrip", false);
    token.right_strip = entry.value("rstrip", false);
    token.special = entry.value("special", false);
    if (token.id < 0 || token.content.empty() || token.content.size() > kMaxContent) {
      throw ArtifactError("The tokenizer's added token '" + Shown(token.content) + "' has a wrong number or text.",
                          "Use the original model's tokenizer.json.");
    }
    const bool normalized = entry.value("normalized", !token.special);
    const std::string pattern = normalized ? normalizer(token.content) : token.content;
    token.text = pattern;  // what `tokenizers` decodes it to
    const size_t index = tokens_.size();
    by_id_[token.id] = index;
    ids_[token.content] = token.id;
    if (token.special) special_.insert(token.content);
    if (!pattern.empty()) {
      patterns_[normalized][pattern] = index;
      lengths_[normalized][static_cast<unsigned char>(pattern[0])].push_back(pattern.size());
    }
    tokens_.push_back(std::move(token));
  }
  for (auto& by_byte : lengths_) {
    for (auto& lengths : by_byte) {
      std::sort(lengths.rbegin(), lengths.rend());
      lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
    }
  }
}

const AddedTokens::Token* AddedTokens::Longest(std::string_view text, size_t offset, bool normalized,
                                               size_t& length) const {
  for (const size_t candidate : lengths_[normalized][static_cast<unsigned char>(text[offset])]) {
    if (candidate > text.size() - offset) continue;
    const auto found = patterns_[normalized].find(text.substr(offset, candidate));
    if (found == patterns_[normalized].end()) continue;
    length = candidate;  // of the pattern, which differs from the content's where that is normalized
    return &tokens_[found->second];
  }
  return nullptr;
}

std::vector<Part> AddedTokens::Split(std::string_view text, bool normalized, bool special_as_text) const {
  std::vector<Part> parts;
  size_t done = 0;
  for (size_t offset = 0; offset < text.size();) {
    size_t length = 0;
    const Token* token = Longest(text, offset, normalized, length);
    if (token == nullptr) {
      ++offset;
      continue;
    }
    size_t start = offset, end = offset + length;
    offset = end;
    if (special_as_text && token->special) continue;
    if (token->single_word && !StandsAlone(text, start, end)) continue;
    if (token->left_strip) start = std::max(done, SpacesBefore(text, start));
    if (token->right_strip) end = SpacesAfter(text, end);
    if (done < start) parts.push_back({done, start, -1});
    parts.push_back({start, end, token->id});
    done = end;
  }
  if (done < text.size()) parts.push_back({done, text.size(), -1});
  return parts;
}

const std::string* AddedTokens::Text(TokenId id) const {
  const auto found = by_id_.find(id);
  return found == by_id_.end() ? nullptr : &tokens_[found->second].text;
}

TokenId AddedTokens::Find(const std::string& text) const {
  const auto found = ids_.find(text);
  return found == ids_.end() ? -1 : found->second;
}

}  // namespace qe_edge
