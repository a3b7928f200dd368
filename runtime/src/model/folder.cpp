#include "model/folder.h"

#include <algorithm>
#include <array>
#include <string_view>

#include "base/files.h"
#include "base/sha256.h"
#include "base/text.h"

namespace qe_edge {
namespace {

namespace fs = std::filesystem;

// What decides how a model computes, as qe_edge/checkpoint/known_files.py lists it.
constexpr std::array<std::string_view, 20> kConfiguration = {
    "adapter_config.json",     "added_tokens.json",         "additional_chat_templates",    "chat_template.jinja",
    "chat_template.json",      "config.json",               "generation_config.json",       "merges.txt",
    "model.safetensors.index.json", "preprocessor_config.json", "processor_config.json",   "sentencepiece.bpe.model",
    "special_tokens_map.json", "spiece.model",              "tokenizer.json",               "tokenizer.model",
    "tokenizer_config.json",   "video_preprocessor_config.json", "vocab.json",              "vocab.txt"};
constexpr std::array<std::string_view, 4> kLoaded = {".onnx", ".data", ".engine", ".safetensors"};

// Neither '..' nor a hidden file, and no path that starts at the root.
bool IsPlain(std::string_view name) {
  bool start = true;
  for (const char c : name) {
    if (c == '\\' || static_cast<unsigned char>(c) < 0x20 || (start && (c == '.' || c == '/'))) return false;
    start = c == '/';
  }
  return !name.empty() && !start && name.size() < 1024;
}

bool IsInside(const fs::path& folder, const fs::path& path) {
  const auto relative = fs::canonical(path).lexically_relative(fs::canonical(folder));
  return !relative.empty() && *relative.begin() != "..";
}

bool IsRead(const std::string& name) {
  const auto ends = [&](std::string_view ending) {
    return name.size() >= ending.size() && name.compare(name.size() - ending.size(), ending.size(), ending) == 0;
  };
  return std::find(kConfiguration.begin(), kConfiguration.end(), name) != kConfiguration.end() ||
         std::any_of(kLoaded.begin(), kLoaded.end(), ends);
}

void CheckNothingAdded(const fs::path& folder, const Json& table) {
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (!table.contains(name) && !entry.is_directory() && IsRead(name)) {
      throw ArtifactError("'" + entry.path().string() + "' was added after the folder was written.",
                          "Remove it, or: " + std::string(kAgain));
    }
  }
}

void CheckSize(const fs::path& folder, const std::string& name, const Json& record) {
  const std::string damaged = "'" + folder.string() + "' is damaged: ";
  if (!IsPlain(name)) throw ArtifactError(damaged + "'" + Shown(name) + "' is no plain file name.", kAgain);
  const fs::path path = folder / fs::u8path(name);
  if (!fs::is_regular_file(path)) throw ArtifactError(damaged + "'" + Shown(name) + "' is missing.", kAgain);
  if (!IsInside(folder, path)) {
    throw ArtifactError("'" + path.string() + "' is a link that points outside '" + folder.string() + "'.",
                        "Put the file itself in the place of the link.");
  }
  const auto size = record.at("size").get<uint64_t>();
  if (fs::file_size(path) != size) {
    throw ArtifactError("'" + path.string() + "' is damaged: it has " + std::to_string(fs::file_size(path)) +
                            " bytes and was written with " + std::to_string(size) + ".",
                        kAgain);
  }
}

}  // namespace

void CheckFiles(const fs::path& folder, const Json& table) {
  for (const auto& item : table.items()) CheckSize(folder, item.key(), item.value());
  CheckNothingAdded(folder, table);
  for (const auto& item : table.items()) {
    const fs::path path = folder / fs::u8path(item.key());
    const MappedFile file(path);
    if (Sha256::Of(file.bytes()) != item.value().at("sha256").get<std::string>()) {
      throw ArtifactError("'" + path.string() + "' is damaged: its SHA-256 is not the one that was written.", kAgain);
    }
  }
}

}  // namespace qe_edge
