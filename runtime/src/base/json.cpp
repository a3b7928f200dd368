#include "base/json.h"

#include <charconv>
#include <cmath>

#include "base/sha256.h"
#include "base/text.h"

namespace qe_edge {
namespace {

constexpr int kMaxDepth = 64;  // nested tables and lists

bool TooDeep(std::string_view text) {
  int depth = 0;
  bool quoted = false;
  for (size_t at = 0; at < text.size(); ++at) {
    const char c = text[at];
    if (quoted) {
      if (c == '\\') ++at;
      else if (c == '"') quoted = false;
    } else if (c == '"') {
      quoted = true;
    } else if (c == '[' || c == '{') {
      if (++depth > kMaxDepth) return true;
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return false;
}

// As repr() of Python: the shortest digits, with an exponent below 1e-4 and from 1e16 on.
std::string PythonFloat(double value) {
  char digits[40];
  const double size = std::fabs(value);
  const bool plain = size == 0 || (size >= 1e-4 && size < 1e16);
  const auto format = plain ? std::chars_format::fixed : std::chars_format::scientific;
  const auto result = std::to_chars(digits, digits + sizeof(digits), value, format);
  std::string text(digits, result.ptr);
  if (plain && text.find('.') == std::string::npos) text += ".0";
  return text;
}

void Append(std::string& out, const Json& value) {
  if (value.is_object() || value.is_array()) {
    bool first = true;
    out += value.is_object() ? '{' : '[';
    for (const auto& item : value.items()) {
      if (!first) out += ',';
      first = false;
      if (value.is_object()) out += Json(item.key()).dump(-1, ' ', true) + ':';
      Append(out, item.value());
    }
    out += value.is_object() ? '}' : ']';
  } else if (value.is_number_float()) {
    out += PythonFloat(value.get<double>());
  } else {
    out += value.dump(-1, ' ', true);
  }
}

}  // namespace

Json ParseJsonTable(std::string_view text, const std::string& where, const std::string& remedy) {
  if (text.substr(0, 3) == "\xEF\xBB\xBF") text.remove_prefix(3);
  const size_t invalid = FirstInvalid(text);
  if (invalid != std::string_view::npos)
    throw ArtifactError("'" + where + "' is not UTF-8: byte " + std::to_string(invalid) + " is wrong.", remedy);
  if (TooDeep(text))
    throw ArtifactError("'" + where + "' is nested deeper than " + std::to_string(kMaxDepth) + " levels.", remedy);
  Json value = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (value.is_discarded()) throw ArtifactError("'" + where + "' is not valid JSON.", remedy);
  if (!value.is_object()) throw ArtifactError("'" + where + "' holds no JSON table.", remedy);
  return value;
}

std::string CanonicalJson(const Json& value) {
  std::string out;
  Append(out, value);
  return out;
}

void CheckSeal(const Json& table, const std::string& where, const std::string& remedy) {
  Json content = table;
  const Json digest = content.at("digest");
  content.erase("digest");
  if (!digest.is_string() || digest.get<std::string>() != Sha256::Of(CanonicalJson(content)))
    throw ArtifactError("'" + where + "' was changed after it was written: its digest is another one.", remedy);
}

}  // namespace qe_edge
