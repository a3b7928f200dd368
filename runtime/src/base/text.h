#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace qe_edge {

// The first byte that is not UTF-8, or npos. Surrogates and overlong forms are not UTF-8.
size_t FirstInvalid(std::string_view text);

// The code point at `offset` of valid UTF-8; moves `offset` behind it.
char32_t NextCodePoint(std::string_view text, size_t& offset);

void AppendCodePoint(std::string& text, char32_t code_point);

// Bytes of the character whose first byte this is, in valid UTF-8.
size_t CharacterBytes(unsigned char first);

// Bytes as UTF-8 where they are; every maximal wrong part becomes one U+FFFD, as Unicode recommends.
std::string Lossy(std::string_view bytes);

// How many bytes at the end may be the start of a character that is not complete.
size_t IncompleteTail(std::string_view bytes);

// White_Space of Unicode.
bool IsSpace(char32_t code_point);

std::string StripSpaces(std::string_view text);

// A stranger's name for a message: without control characters, cut off.
std::string Shown(std::string_view name);

}  // namespace qe_edge
