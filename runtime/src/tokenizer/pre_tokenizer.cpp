#include <utf8proc.h>

#include "base/text.h"
#include "tokenizer/regex.h"
#include "tokenizer/steps.h"

namespace qe_edge {
namespace {

// GPT-2's own pattern, which "ByteLevel" uses unless it is told not to.
constexpr char kByteLevelPattern[] =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

enum class Behavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

Behavior BehaviorOf(const Json& step) {
  const auto name = step.at("behavior").get<std::string>();
  if (name == "Removed") return Behavior::kRemoved;
  if (name == "Isolated") return Behavior::kIsolated;
  if (name == "MergedWithPrevious") return Behavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return Behavior::kMergedWithNext;
  if (name == "Contiguous") return Behavior::kContiguous;
  RefuseStep("pre-tokenizer", step);
}

// What is kept of a text's spans: matches are removed, stay alone, or join a neighbour.
std::vector<Span> Arrange(const std::vector<Span>& spans, Behavior behavior) {
  std::vector<Span> kept;
  bool previous = false;
  if (behavior == Behavior::kMergedWithNext) {
    for (auto span = spans.rbegin(); span != spans.rend(); ++span) {
      if (span->matched && !previous && !kept.empty()) kept.back().start = span->start;
      else kept.push_back(*span);
      previous = span->matched;
    }
    return {kept.rbegin(), kept.rend()};
  }
  for (const Span& span : spans) {
    if (behavior == Behavior::kRemoved) {
      if (!span.matched) kept.push_back(span);
    } else if (behavior == Behavior::kContiguous && !kept.empty() && previous == span.matched) {
      kept.back().end = span.end;
    } else if (behavior == Behavior::kMergedWithPrevious && span.matched && !previous && !kept.empty()) {
      kept.back().end = span.end;
    } else {
      kept.push_back(span);
    }
    previous = span.matched;
  }
  return kept;
}

void Cut(const Piece& piece, const std::vector<Span>& spans, std::vector<Piece>& out) {
  for (const Span& span : spans) {
    if (span.end > span.start)
      out.push_back({piece.text.substr(span.start, span.end - span.start), piece.first && span.start == 0});
  }
}

PreTokenizer SplitBy(Regex pattern, Behavior behavior, bool invert) {
  return [pattern = std::move(pattern), behavior, invert](std::vector<Piece> pieces) {
    std::vector<Piece> out;
    for (const Piece& piece : pieces) {
      std::vector<Span> spans = pattern.Split(piece.text);
      if (invert) {
        for (Span& span : spans) span.matched = !span.matched;
      }
      Cut(piece, Arrange(spans, behavior), out);
    }
    return out;
  };
}

bool IsNumeric(char32_t code_point) {
  const auto category = utf8proc_category(static_cast<utf8proc_int32_t>(code_point));
  return category == UTF8PROC_CATEGORY_ND || category == UTF8PROC_CATEGORY_NL || category == UTF8PROC_CATEGORY_NO;
}

PreTokenizer Digits(bool individual) {
  return [individual](std::vector<Piece> pieces) {
    std::vector<Piece> out;
    for (const Piece& piece : pieces) {
      std::vector<Span> spans;
      for (size_t offset = 0; offset < piece.text.size();) {
        const size_t start = offset;
        const bool numeric = IsNumeric(NextCodePoint(piece.text, offset));
        if (!spans.empty() && spans.back().matched == numeric && !(numeric && individual)) spans.back().end = offset;
        else spans.push_back({start, offset, numeric});
      }
      Cut(piece, spans, out);
    }
    return out;
  };
}

PreTokenizer ByteLevel(const Json& step) {
  const bool prefix = step.at("add_prefix_space").get<bool>();
  const bool split = step.value("use_regex", true);
  return [prefix, split, pattern = Regex(kByteLevelPattern)](std::vector<Piece> pieces) {
    if (prefix) {
      for (Piece& piece : pieces) {
        if (piece.text.empty() || piece.text[0] != ' ') piece.text.insert(0, " ");
      }
    }
    std::vector<Piece> out;
    for (Piece& piece : pieces) {
      if (split) Cut(piece, pattern.Split(piece.text), out);
      else out.push_back(std::move(piece));
    }
    for (Piece& piece : out) {
      std::string bytes;
      for (const char byte : piece.text) AppendCodePoint(bytes, CharacterOfByte(static_cast<unsigned char>(byte)));
      piece.text = std::move(bytes);
    }
    return out;
  };
}

PreTokenizer Metaspace(const Json& step) {
  const auto mark = step.at("replacement").get<std::string>();
  const bool added = step.value("add_prefix_space", true);
  const auto scheme = step.value("prepend_scheme", std::string(added ? "always" : "never"));
  const bool split = step.value("split", true);
  if (scheme != "always" && scheme != "first" && scheme != "never") RefuseStep("pre-tokenizer", step);
  return [mark, scheme, split, space = Regex::Literal(" "), marks = Regex::Literal(mark)](std::vector<Piece> pieces) {
    std::vector<Piece> out;
    for (Piece& piece : pieces) {
      piece.text = space.Replace(piece.text, mark);
      const bool marked = piece.text.compare(0, mark.size(), mark) == 0;
      if (!marked && (scheme == "always" || (scheme == "first" && piece.first))) piece.text.insert(0, mark);
      if (split) Cut(piece, Arrange(marks.Split(piece.text), Behavior::kMergedWithNext), out);
      else out.push_back(std::move(piece));
    }
    return out;
  };
}

}  // namespace

PreTokenizer MakePreTokenizer(const Json& step) {
  if (step.is_null()) return [](std::vector<Piece> pieces) { return pieces; };
  const auto type = step.at("type").get<std::string>();
  if (type == "ByteLevel") return ByteLevel(step);
  if (type == "Metaspace") return Metaspace(step);
  if (type == "Digits") return Digits(step.at("individual_digits").get<bool>());
  if (type == "Split") return SplitBy(MakePattern(step.at("pattern")), BehaviorOf(step), step.at("invert").get<bool>());
  if (type == "Sequence") {
    std::vector<PreTokenizer> steps;
    for (const Json& part : step.at("pretokenizers")) steps.push_back(MakePreTokenizer(part));
    return [steps](std::vector<Piece> pieces) {
      for (const PreTokenizer& part : steps) pieces = part(std::move(pieces));
      return pieces;
    };
  }
  RefuseStep("pre-tokenizer", step);
}

}  // namespace qe_edge
