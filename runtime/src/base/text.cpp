#include "base/text.h"

namespace qe_edge {
namespace {

constexpr size_t kShown = 80;  // bytes of a stranger's name in a message

bool Continues(unsigned char byte) { return (byte & 0xC0) == 0x80; }

// Whether `second` may follow `first`: rules out overlong forms, surrogates and what lies beyond U+10FFFF.
bool SecondFits(unsigned char first, unsigned char second) {
  switch (first) {
    case 0xE0: return second >= 0xA0 && second <= 0xBF;
    case 0xED: return second >= 0x80 && second <= 0x9F;
    case 0xF0: return second >= 0x90 && second <= 0xBF;
    case 0xF4: return second >= 0x80 && second <= 0x8F;
    default: return Continues(second);
  }
}

size_t Expected(unsigned char first) {
  if (first < 0x80) return 1;
  if (first >= 0xC2 && first <= 0xDF) return 2;
  if (first >= 0xE0 && first <= 0xEF) return 3;
  if (first >= 0xF0 && first <= 0xF4) return 4;
  return 0;
}

// Bytes from `offset` on that belong to one character, at most `expected`: fewer if it breaks off.
size_t Valid(std::string_view bytes, size_t offset, size_t expected) {
  size_t found = 1;
  const auto at = [&](size_t index) { return static_cast<unsigned char>(bytes[offset + index]); };
  while (found < expected && offset + found < bytes.size()) {
    const bool fits = found == 1 ? SecondFits(at(0), at(1)) : Continues(at(found));
    if (!fits) break;
    ++found;
  }
  return found;
}

}  // namespace

size_t FirstInvalid(std::string_view text) {
  for (size_t offset = 0; offset < text.size();) {
    const size_t expected = Expected(static_cast<unsigned char>(text[offset]));
    if (expected == 0 || Valid(text, offset, expected) < expected) return offset;
    offset += expected;
  }
  return std::string_view::npos;
}

size_t CharacterBytes(unsigned char first) { return first < 0x80 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4; }

char32_t NextCodePoint(std::string_view text, size_t& offset) {
  const auto first = static_cast<unsigned char>(text[offset]);
  const size_t bytes = CharacterBytes(first);
  char32_t code_point = bytes == 1 ? first : first & (0xFFu >> (bytes + 1));
  for (size_t index = 1; index < bytes; ++index)
    code_point = (code_point << 6) | (static_cast<unsigned char>(text[offset + index]) & 0x3F);
  offset += bytes;
  return code_point;
}

void AppendCodePoint(std::string& text, char32_t code_point) {
  const auto add = [&](char32_t bits) { text += static_cast<char>(bits); };
  if (code_point < 0x80) return add(code_point);
  if (code_point < 0x800) {
    add(0xC0 | (code_point >> 6));
  } else if (code_point < 0x10000) {
    add(0xE0 | (code_point >> 12));
    add(0x80 | ((code_point >> 6) & 0x3F));
  } else {
    add(0xF0 | (code_point >> 18));
    add(0x80 | ((code_point >> 12) & 0x3F));
    add(0x80 | ((code_point >> 6) & 0x3F));
  }
  add(0x80 | (code_point & 0x3F));
}

std::string Lossy(std::string_view bytes) {
  std::string text;
  text.reserve(bytes.size());
  for (size_t offset = 0; offset < bytes.size();) {
    const size_t expected = Expected(static_cast<unsigned char>(bytes[offset]));
    const size_t found = expected == 0 ? 1 : Valid(bytes, offset, expected);
    if (expected == found) text += bytes.substr(offset, found);
    else text += "\xEF\xBF\xBD";
    offset += found;
  }
  return text;
}

size_t IncompleteTail(std::string_view bytes) {
  for (size_t tail = 1; tail <= 3 && tail <= bytes.size(); ++tail) {
    const size_t offset = bytes.size() - tail;
    const size_t expected = Expected(static_cast<unsigned char>(bytes[offset]));
    if (expected > tail && Valid(bytes, offset, expected) == tail) return tail;
    if (expected != 0) return 0;
  }
  return 0;
}

bool IsSpace(char32_t c) {
  return (c >= 0x9 && c <= 0xD) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
         c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

std::string StripSpaces(std::string_view text) {
  size_t start = text.size(), end = 0;
  for (size_t offset = 0; offset < text.size();) {
    const size_t here = offset;
    if (IsSpace(NextCodePoint(text, offset))) continue;
    if (start == text.size()) start = here;
    end = offset;
  }
  return start < end ? std::string(text.substr(start, end - start)) : std::string();
}

std::string Shown(std::string_view name) {
  std::string text;
  for (const char byte : name.substr(0, kShown)) text += static_cast<unsigned char>(byte) < 0x20 || byte == 0x7F ? '?' : byte;
  text.resize(text.size() - IncompleteTail(text));
  return Lossy(text) + (name.size() > kShown ? "..." : "");
}

}  // namespace qe_edge
