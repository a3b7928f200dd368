// Tokenizes JSON strings, one a line: writes [ids, text of the ids, the same text as a stream gives it].
//
//   tokenize TOKENIZER.JSON [special-as-text | frame | raw] < LINES
//
// "raw" takes the lines as they are.

#include <fstream>
#include <iostream>
#include <iterator>

#include "tokenizer/tokenizer.h"

int main(int count, char** arguments) {
  using namespace qe_edge;
  const std::string mode = count > 2 ? arguments[2] : "";
  std::ifstream file(arguments[1], std::ios::binary);
  const std::string json{std::istreambuf_iterator<char>(file), {}};
  try {
    const auto tokenizer = std::make_shared<const Tokenizer>(json, arguments[1]);
    std::string line;
    while (std::getline(std::cin, line)) {
      const std::string text = mode == "raw" ? line : Json::parse(line).get<std::string>();
      const auto ids = tokenizer->Encode(text, mode == "special-as-text", mode == "frame");
      TextStream stream(tokenizer);
      std::string streamed;
      for (const TokenId id : ids) streamed += stream.Add(id);
      streamed += stream.Finish();
      std::cout << Json{ids, tokenizer->Decode(ids), streamed}.dump() << "\n";
    }
  } catch (const Error& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}
