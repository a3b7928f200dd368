#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace qe_edge {

// A part of a text, and whether a pattern matched it.
struct Span {
  size_t start, end;
  bool matched;
};

// A regular expression of a tokenizer.json: written for Oniguruma, run by PCRE2. May be used by threads at once.
class Regex {
 public:
  // Throws ArtifactError for a pattern that is wrong, or that the two libraries read differently.
  explicit Regex(const std::string& pattern);

  // A text without special characters.
  static Regex Literal(const std::string& text);

  // The whole text as parts, matched and not; a text without matches is one part.
  std::vector<Span> Split(std::string_view text) const;

  // The text with `content` in the place of every match.
  std::string Replace(std::string_view text, const std::string& content) const;

 private:
  std::shared_ptr<void> code_;
};

}  // namespace qe_edge
