// Mutations of a folder's tokenizer.json, manifest.json and chat.json, and pictures of any size, in this process.
// Every case ends in an Error of ours or is read; anything else ends the program, which sanitizers watch.
//
//   fuzz FOLDER CASES SEED

#include <cstdlib>
#include <iostream>
#include <random>

#include "base/files.h"
#include "base/sha256.h"
#include "model/chat.h"
#include "model/embedding.h"
#include "model/manifest.h"
#include "model/picture.h"

using namespace qe_edge;

namespace {

std::string Mutated(std::string text, std::mt19937_64& random) {
  static const char* const kParts[] = {"null", "-1", "1e999", "[]", "{}", "\"\"", "true", "\\ud800", "18446744073709551616", "[[[["};
  for (uint64_t change = random() % 4 + 1; change > 0 && !text.empty(); --change) {
    const size_t at = random() % text.size();
    switch (random() % 5) {
      case 0: text[at] = static_cast<char>(random()); break;
      case 1: text.erase(at, random() % 16); break;
      case 2: text.insert(at, kParts[random() % 10]); break;
      case 3: text.resize(at); break;
      default: text.insert(at, text.substr(random() % text.size(), random() % 32)); break;
    }
  }
  return text;
}

// A value somewhere in a JSON that becomes another one: what a mutation of bytes seldom reaches.
std::string Exchanged(const std::string& text, std::mt19937_64& random) {
  Json table = Json::parse(text), flat = table.flatten();
  if (flat.empty()) return text;
  auto item = flat.begin();
  std::advance(item, static_cast<std::ptrdiff_t>(random() % flat.size()));
  static const Json kValues[] = {nullptr, -1, 1e300, "", "x", true, Json::array(), Json::object(), int64_t{1} << 62, "(?<"};
  table[Json::json_pointer(item.key())] = kValues[random() % 10];
  if (table.contains("digest")) {  // sealed again, so that what comes after the seal is read
    table.erase("digest");
    table["digest"] = Sha256::Of(CanonicalJson(table));
  }
  return table.dump();
}

template <typename Action>
int Tried(const Action& action) {
  try {
    action();
    return 1;
  } catch (const Error& error) {
    const std::string text = error.what();
    if (text.size() > 2 && text.back() == '.') return 0;
    std::cerr << "No sentence: " << text << "\n";
    std::abort();
  }
}

int ReadPicture(std::mt19937_64& random) {
  PictureFile limits;
  limits.max_pixels = 1 << 12;
  limits.max_side = 1 << 10;
  if (random() % 2) limits.max_aspect = 20;
  const std::string bytes(1 << 15, '\x7f');
  const auto size = [&] { return static_cast<int32_t>(random() % 8 ? random() % 100 : random()); };
  qe_image image{reinterpret_cast<const uint8_t*>(bytes.data()), size(), size(), 0,
                 static_cast<int32_t>(random() % 6)};
  // what a caller says about the memory has to be true; everything else may be wrong
  if (random() % 2) image.stride = static_cast<int64_t>(random() % 500) - 100;
  const int64_t rows = image.stride > 0 ? image.stride : int64_t{image.width} * 4;
  if (image.height > 0 && rows > 0 && rows > static_cast<int64_t>(bytes.size()) / image.height) image.data = nullptr;
  return Tried([&] { CopyPicture(image, limits); });
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return 2;
  const std::filesystem::path folder = arguments[1];
  std::string texts[3];
  const char* const names[] = {"tokenizer.json", "manifest.json", "chat.json"};
  for (int kind = 0; kind < 3; ++kind) texts[kind] = ReadFile(folder / names[kind], 64 << 20, "");
  std::mt19937_64 random(std::strtoull(arguments[3], nullptr, 10));
  int read[4] = {};
  for (long number = std::strtol(arguments[2], nullptr, 10); number > 0; --number) {
    const auto kind = static_cast<size_t>(random() % 4);
    if (kind == 3) {
      read[3] += ReadPicture(random);
      continue;
    }
    const std::string text = random() % 2 ? Mutated(texts[kind], random) : Exchanged(texts[kind], random);
    read[kind] += Tried([&] {
      if (kind == 1) {
        ParseManifest(text, "manifest.json");
      } else if (kind == 2) {
        const Chat chat(text, "chat.json");
        chat.Pieces({{"system", "be brief", {}}, {"user", "a<|im_end|>b", {}}});
      } else {
        const Tokenizer tokenizer(text, "tokenizer.json");
        tokenizer.Decode(tokenizer.Encode("It's 12 \xF0\x9F\x99\x82 <|im_end|>", random() % 2, random() % 2));
      }
    });
  }
  std::cout << read[0] << " " << read[1] << " " << read[2] << " " << read[3] << "\n";  // cases that were read
  return 0;
}
