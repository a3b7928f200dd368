#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "base/text.h"
#include "tokenizer/regex.h"
#include "tokenizer/steps.h"

namespace qe_edge {
namespace {

constexpr size_t kMaxGrowth = 256;       // how many times longer a replacement may make a text
constexpr size_t kMaxBytes = 64 << 20;  // of a text after any step

constexpr size_t kMaxUnicodeGrowth = 18;  // bytes of a compatibility decomposition for a byte, at most

// Steps multiply: without a bound a short file and a short text fill the memory.
void CheckGrowth(size_t bytes, size_t times) {
  if (bytes > kMaxBytes / times) {
    throw InputError("A text becomes longer than " + std::to_string(kMaxBytes) + " bytes when it is normalized.",
                     "Ask a shorter question, or use the tokenizer of the original model.");
  }
}

Normalizer UnicodeForm(int options) {
  return [options](std::string text) {
    CheckGrowth(text.size(), kMaxUnicodeGrowth);
    utf8proc_uint8_t* mapped = nullptr;
    const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
    const utf8proc_ssize_t size = utf8proc_map(bytes, static_cast<utf8proc_ssize_t>(text.size()), &mapped,
                                               static_cast<utf8proc_option_t>(options | UTF8PROC_STABLE));
    const std::unique_ptr<utf8proc_uint8_t, void (*)(void*)> held(mapped, std::free);
    if (size == UTF8PROC_ERROR_NOMEM) throw std::bad_alloc();
    if (size < 0) throw InputError("A text cannot be normalized.", "Write it as UTF-8.");
    return std::string(reinterpret_cast<const char*>(mapped), static_cast<size_t>(size));
  };
}

Normalizer Strip(bool left, bool right) {
  return [left, right](std::string text) {
    const std::string inner = StripSpaces(text);
    const size_t start = text.find(inner);
    if (inner.empty()) return left || right ? std::string() : text;
    if (right) text.resize(start + inner.size());
    return left ? text.substr(start) : text;
  };
}

}  // namespace

Regex MakePattern(const Json& pattern) {
  if (pattern.contains("Regex")) return Regex(pattern.at("Regex").get<std::string>());
  return Regex::Literal(pattern.at("String").get<std::string>());
}

Normalizer MakeNormalizer(const Json& step) {
  if (step.is_null()) return [](std::string text) { return text; };
  const auto type = step.at("type").get<std::string>();
  if (type == "NFC") return UnicodeForm(UTF8PROC_COMPOSE);
  if (type == "NFD") return UnicodeForm(UTF8PROC_DECOMPOSE);
  if (type == "NFKC") return UnicodeForm(UTF8PROC_COMPOSE | UTF8PROC_COMPAT);
  if (type == "NFKD") return UnicodeForm(UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT);
  if (type == "Strip") return Strip(step.at("strip_left").get<bool>(), step.at("strip_right").get<bool>());
  if (type == "Prepend") {
    const auto before = step.at("prepend").get<std::string>();
    return [before](const std::string& text) {
      CheckGrowth(before.size() + text.size(), 1);
      return text.empty() ? text : before + text;
    };
  }
  if (type == "Replace") {
    const auto content = step.at("content").get<std::string>();
    if (content.size() > kMaxGrowth) RefuseStep("normalizer", step);
    return [pattern = MakePattern(step.at("pattern")), content](const std::string& text) {
      CheckGrowth(text.size(), std::max<size_t>(content.size(), 1));
      return pattern.Replace(text, content);
    };
  }
  if (type == "Sequence") {
    std::vector<Normalizer> steps;
    for (const Json& part : step.at("normalizers")) steps.push_back(MakeNormalizer(part));
    return [steps](std::string text) {
      for (const Normalizer& part : steps) text = part(std::move(text));
      return text;
    };
  }
  RefuseStep("normalizer", step);
}

void RefuseStep(const char* kind, const Json& step) {
  const std::string type = step.is_object() ? step.value("type", "") : "";
  throw ArtifactError("The tokenizer has a " + std::string(kind) + " '" + Shown(type) + "', which C++ does not have.",
                      "Use a model with a byte-level BPE or SentencePiece-style BPE tokenizer, or run it from Python.");
}

}  // namespace qe_edge
