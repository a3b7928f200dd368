#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"

namespace qe_edge {

// A piece of text on its way to the model.
struct Piece {
  std::string text;
  bool first;  // whether it stands at the start of the whole text
};

// The steps of a tokenizer.json around its model. Each throws ArtifactError where it names a step that is not supported:
// a step that is left out would change tokens.
using Normalizer = std::function<std::string(std::string)>;
using PreTokenizer = std::function<std::vector<Piece>(std::vector<Piece>)>;
using Decoder = std::function<std::vector<std::string>(std::vector<std::string>)>;

Normalizer MakeNormalizer(const Json& step);
PreTokenizer MakePreTokenizer(const Json& step);
Decoder MakeDecoder(const Json& step);

// The pattern {"String": text} or {"Regex": pattern} of a step.
class Regex;
Regex MakePattern(const Json& pattern);

// GPT-2's alphabet: every byte as a printable character, and back. -1 is no character of it.
char32_t CharacterOfByte(unsigned char byte);
int ByteOfCharacter(char32_t character);

// The byte that a token such as "<0x0A>" stands for, or -1.
int ByteOfToken(std::string_view token);

// Throws the error about a step that is not supported.
[[noreturn]] void RefuseStep(const char* kind, const Json& step);

}  // namespace qe_edge
