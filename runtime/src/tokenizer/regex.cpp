#define PCRE2_CODE_UNIT_WIDTH 8
#include "tokenizer/regex.h"

#include <pcre2.h>

#include <cctype>

#include "base/error.h"
#include "base/text.h"

namespace qe_edge {
namespace {

constexpr char kRemedy[] = "Use the original model's tokenizer.json.";
constexpr uint32_t kMatchLimit = 10'000'000;  // steps of one match; a pattern that needs more is hostile
constexpr uint32_t kHeapLimit = 64 * 1024;    // KiB
// White_Space of Unicode: PCRE2 counts U+180E too.
constexpr char kSpaces[] =
    R"(\t-\r\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";

Error Unsupported(const std::string& pattern, const std::string& what) {
  return ArtifactError("The tokenizer's pattern '" + Shown(pattern) + "' " + what + ".", kRemedy);
}

// The pattern with the classes that PCRE2 defines differently spelt out.
std::string Translate(const std::string& pattern) {
  std::string out;
  bool in_class = false;
  for (size_t at = 0; at < pattern.size(); ++at) {
    const char c = pattern[at];
    const char next = at + 1 < pattern.size() ? pattern[at + 1] : '\0';
    if (c == '\\') {
      if (next == 's' || (next == 'S' && !in_class))
        out += in_class ? kSpaces : std::string(next == 's' ? "[" : "[^") + kSpaces + "]";
      else if (next == 'S' || next == 'h' || next == 'H' || next == 'K' || next == 'G' || next == 'g' || next == '\0')
        throw Unsupported(pattern, "has an escape that is not supported");
      else
        out.append({c, next});
      ++at;
      if ((next == 'p' || next == 'P' || next == 'x') && pattern[at + 1] == '{') {  // its '}' is no repetition's
        const size_t close = pattern.find('}', at);
        if (close == std::string::npos) throw Unsupported(pattern, "has an escape that does not end");
        out += pattern.substr(at + 1, close - at);
        at = close;
      }
      continue;
    }
    if (in_class && (c == '[' || (c == '&' && next == '&'))) throw Unsupported(pattern, "has a class within a class");
    if (!in_class && c == '}' && next == '+') throw Unsupported(pattern, "repeats a repetition");
    if (c == '[') {
      in_class = true;
    } else if (c == ']') {
      in_class = false;
    }
    out += c;
  }
  return out;
}

}  // namespace

Regex::Regex(const std::string& pattern) {
  const std::string translated = Translate(pattern);
  int error = 0;
  PCRE2_SIZE where = 0;
  pcre2_code* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                                   PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &error, &where, nullptr);
  if (code == nullptr) throw Unsupported(pattern, "is no regular expression");
  code_ = std::shared_ptr<void>(code, [](void* held) { pcre2_code_free(static_cast<pcre2_code*>(held)); });
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);  // faster where there is a JIT; matching works without
}

Regex Regex::Literal(const std::string& text) {
  std::string pattern;
  for (const char c : text) {
    if (c != '_' && static_cast<unsigned char>(c) < 0x80 && !isalnum(static_cast<unsigned char>(c))) pattern += '\\';
    pattern += c;
  }
  return Regex(pattern);
}

std::vector<Span> Regex::Split(std::string_view text) const {
  const auto* code = static_cast<const pcre2_code*>(code_.get());
  const std::unique_ptr<pcre2_match_data, void (*)(pcre2_match_data*)> data(
      pcre2_match_data_create_from_pattern(code, nullptr), pcre2_match_data_free);
  const std::unique_ptr<pcre2_match_context, void (*)(pcre2_match_context*)> context(
      pcre2_match_context_create(nullptr), pcre2_match_context_free);
  if (!data || !context) throw std::bad_alloc();
  pcre2_set_match_limit(context.get(), kMatchLimit);
  pcre2_set_heap_limit(context.get(), kHeapLimit);
  std::vector<Span> spans;
  if (text.empty()) return spans;
  size_t end = 0;
  for (size_t from = 0; from <= text.size();) {
    const int found = pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                                  PCRE2_NO_UTF_CHECK, data.get(), context.get());
    if (found == PCRE2_ERROR_NOMATCH) break;
    if (found < 0) throw InputError("The tokenizer's pattern takes too long on this text.", "Shorten the text.");
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(data.get());
    if (range[0] > end) spans.push_back({end, range[0], false});
    if (range[1] > range[0]) spans.push_back({range[0], range[1], true});
    end = range[1];
    from = range[1];
    if (range[1] == range[0]) from += from < text.size() ? CharacterBytes(static_cast<unsigned char>(text[from])) : 1;
  }
  if (end < text.size()) spans.push_back({end, text.size(), false});
  return spans;
}

std::string Regex::Replace(std::string_view text, const std::string& content) const {
  std::string out;
  for (const Span& span : Split(text)) {
    if (span.matched) out += content;
    else out += text.substr(span.start, span.end - span.start);
  }
  return out;
}

}  // namespace qe_edge
