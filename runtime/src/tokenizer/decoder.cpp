#include <array>
#include <charconv>
#include <unordered_map>

#include "base/text.h"
#include "tokenizer/regex.h"
#include "tokenizer/steps.h"

namespace qe_edge {
namespace {

constexpr char kReplacement[] = "\xEF\xBF\xBD";
constexpr int kBytes = 256;

std::array<char32_t, kBytes> MakeAlphabet() {
  std::array<char32_t, kBytes> alphabet{};
  char32_t next = kBytes;
  for (int byte = 0; byte < kBytes; ++byte) {
    const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
    alphabet[static_cast<size_t>(byte)] = printable ? static_cast<char32_t>(byte) : next++;
  }
  return alphabet;
}

const std::array<char32_t, kBytes>& Alphabet() {
  static const auto alphabet = MakeAlphabet();
  return alphabet;
}

std::vector<std::string> ByteLevel(const std::vector<std::string>& tokens) {
  std::string bytes;
  for (const std::string& token : tokens) {
    const size_t before = bytes.size();
    for (size_t offset = 0; offset < token.size();) {
      const int byte = ByteOfCharacter(NextCodePoint(token, offset));
      if (byte < 0) {  // an added token is no text of the alphabet
        bytes.resize(before);
        bytes += token;
        break;
      }
      bytes += static_cast<char>(byte);
    }
  }
  return {Lossy(bytes)};
}

std::vector<std::string> ByteFallback(const std::vector<std::string>& tokens) {
  std::vector<std::string> out;
  std::string bytes;
  const auto flush = [&] {
    if (bytes.empty()) return;
    if (FirstInvalid(bytes) == std::string::npos) out.push_back(bytes);
    else out.insert(out.end(), bytes.size(), kReplacement);
    bytes.clear();
  };
  for (const std::string& token : tokens) {
    if (const int byte = ByteOfToken(token); byte >= 0) {
      bytes += static_cast<char>(byte);
      continue;
    }
    flush();
    out.push_back(token);
  }
  flush();
  return out;
}

Decoder Strip(const std::string& mark, size_t start, size_t stop) {
  return [=](std::vector<std::string> tokens) {
    for (std::string& token : tokens) {
      for (size_t done = 0; done < start && token.compare(0, mark.size(), mark) == 0; ++done) token.erase(0, mark.size());
      for (size_t done = 0; done < stop && token.size() >= mark.size() &&
                            token.compare(token.size() - mark.size(), mark.size(), mark) == 0; ++done)
        token.resize(token.size() - mark.size());
    }
    return tokens;
  };
}

Decoder Metaspace(const Json& step) {
  const auto mark = step.at("replacement").get<std::string>();
  const bool added = step.value("add_prefix_space", true);
  const bool prepended = step.value("prepend_scheme", std::string(added ? "always" : "never")) != "never";
  return [prepended, pattern = Regex::Literal(mark)](std::vector<std::string> tokens) {
    for (size_t index = 0; index < tokens.size(); ++index)
      tokens[index] = pattern.Replace(tokens[index], index == 0 && prepended ? "" : " ");
    return tokens;
  };
}

}  // namespace

char32_t CharacterOfByte(unsigned char byte) { return Alphabet()[byte]; }

int ByteOfCharacter(char32_t character) {
  static const auto bytes = [] {
    std::unordered_map<char32_t, int> map;
    for (int byte = 0; byte < kBytes; ++byte) map[Alphabet()[static_cast<size_t>(byte)]] = byte;
    return map;
  }();
  const auto found = bytes.find(character);
  return found == bytes.end() ? -1 : found->second;
}

int ByteOfToken(std::string_view token) {
  if (token.size() != 6 || token.substr(0, 3) != "<0x" || token[5] != '>') return -1;
  int byte = 0;
  const auto result = std::from_chars(token.data() + 3, token.data() + 5, byte, 16);
  return result.ptr == token.data() + 5 && byte >= 0 ? byte : -1;
}

Decoder MakeDecoder(const Json& step) {
  const auto type = step.is_null() ? "" : step.at("type").get<std::string>();
  if (type == "ByteLevel") return ByteLevel;
  if (type == "ByteFallback") return ByteFallback;
  if (type == "Metaspace") return Metaspace(step);
  if (type == "Strip") {
    const auto mark = step.at("content").get<std::string>();
    if (mark.empty()) RefuseStep("decoder", step);  // it would be found without end
    return Strip(mark, step.at("start").get<size_t>(), step.at("stop").get<size_t>());
  }
  if (type == "Fuse") {
    return [](const std::vector<std::string>& tokens) {
      std::string text;
      for (const std::string& token : tokens) text += token;
      return std::vector<std::string>{text};
    };
  }
  if (type == "Replace") {
    return [pattern = MakePattern(step.at("pattern")),
            content = step.at("content").get<std::string>()](std::vector<std::string> tokens) {
      for (std::string& token : tokens) token = pattern.Replace(token, content);
      return tokens;
    };
  }
  if (type == "Sequence") {
    std::vector<Decoder> steps;
    for (const Json& part : step.at("decoders")) steps.push_back(MakeDecoder(part));
    return [steps](std::vector<std::string> tokens) {
      for (const Decoder& part : steps) tokens = part(std::move(tokens));
      return tokens;
    };
  }
  RefuseStep("decoder", step);
}

}  // namespace qe_edge
