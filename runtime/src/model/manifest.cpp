#include "model/manifest.h"

#include <algorithm>
#include <cctype>

#include "base/files.h"
#include "base/json.h"
#include "base/text.h"
#include "model/folder.h"

namespace qe_edge {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kVersion = 3;
constexpr size_t kMaxManifest = 16 << 20;

Error Damaged(const std::string& where, const std::string& reason) {
  return ArtifactError("'" + where + "' is damaged: " + reason + ".", kAgain);
}

int64_t Within(const Json& table, const char* key, int64_t least, int64_t most) {
  const Json& value = table.at(key);
  if (!value.is_number_integer()) throw ArtifactError(std::string("A manifest's ") + key + " is no number.", kAgain);
  const auto found = value.get<int64_t>();
  if (found < least || found > most)
    throw ArtifactError(std::string("A manifest's ") + key + " is " + std::to_string(found) + ".", kAgain);
  return found;
}

bool IsFileName(const std::string& name) {
  if (name.empty() || name.size() > 101 || !isalnum(static_cast<unsigned char>(name[0]))) return false;
  for (const char c : name) {
    if (!isalnum(static_cast<unsigned char>(c)) && c != '_' && c != '.' && c != '-') return false;
  }
  return true;
}

std::vector<TensorSpec> Specs(const Json& list) {
  std::vector<TensorSpec> specs;
  for (const Json& entry : list) {
    TensorSpec spec{entry.at("name").get<std::string>(), entry.at("dtype").get<std::string>(), {}};
    for (const Json& size : entry.at("shape")) spec.shape.push_back(size.is_number() ? size.get<int64_t>() : -1);
    specs.push_back(std::move(spec));
  }
  return specs;
}

void ReadProfiles(const Json& profiles, GraphFile& graph) {
  for (const auto& profile : profiles.items()) {
    for (const auto& input : profile.value().items())
      graph.largest[profile.key()][input.key()] = input.value().at(2).get<std::vector<int64_t>>();
  }
}

void ReadGraph(const Json& entry, GraphFile& graph) {
  graph.file = entry.at("file").get<std::string>();
  if (!IsFileName(graph.file)) throw ArtifactError("A manifest's graph has no plain file name.", kAgain);
  graph.inputs = Specs(entry.at("inputs"));
  graph.outputs = Specs(entry.at("outputs"));
  if (graph.inputs.empty() || graph.outputs.empty())
    throw ArtifactError("A manifest's graph '" + graph.file + "' has no inputs or no outputs.", kAgain);
}

std::vector<int64_t> Ids(const Json& table, const char* key, int64_t vocabulary) {
  auto ids = table.at(key).get<std::vector<int64_t>>();
  for (const int64_t id : ids) {
    if (id < 0 || id >= vocabulary)
      throw ArtifactError("A manifest names token " + std::to_string(id) + " of a vocabulary of " +
                              std::to_string(vocabulary) + ".", kAgain);
  }
  return ids;
}

PictureLabel Label(const Json& table, int64_t vocabulary) {
  PictureLabel label{Ids(table, "before", vocabulary), Ids(table, "digits", vocabulary), Ids(table, "after", vocabulary)};
  if (label.digits.size() != 10) throw ArtifactError("A manifest's pictures are numbered without ten digits.", kAgain);
  return label;
}

GenerationSettings Settings(const Json& table, int64_t vocabulary) {
  GenerationSettings found;
  found.eos_token_ids = Ids(table, "eos_token_ids", vocabulary);
  found.suppress_tokens = Ids(table, "suppress_tokens", vocabulary);
  found.begin_suppress_tokens = Ids(table, "begin_suppress_tokens", vocabulary);
  if (found.eos_token_ids.empty()) throw ArtifactError("A manifest names no token that ends an answer.", kAgain);
  found.repetition_penalty = table.at("repetition_penalty").get<double>();
  if (!(found.repetition_penalty >= kMinPenalty && found.repetition_penalty <= kMaxPenalty)) {
    throw ArtifactError("A manifest's repetition_penalty is " + std::to_string(found.repetition_penalty) + ".", kAgain);
  }
  constexpr int64_t most = 1 << 24;
  found.no_repeat_ngram_size = Within(table, "no_repeat_ngram_size", 0, most);
  found.min_length = Within(table, "min_length", 0, most);
  found.min_new_tokens = Within(table, "min_new_tokens", 0, most);
  found.do_sample = table.at("do_sample").get<bool>();
  found.temperature = table.at("temperature").get<double>();
  found.top_k = Within(table, "top_k", 0, most);
  found.top_p = table.at("top_p").get<double>();
  found.min_p = table.at("min_p").get<double>();
  return found;
}

bool EndsWith(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// The cache's tensors have the shapes that their names say, and every one has its output.
void CheckCache(const GraphFile& graph) {
  constexpr int64_t most = int64_t{1} << 28;  // numbers of a state
  for (const TensorSpec& spec : graph.inputs) {
    if (spec.name.rfind(kPast, 0) != 0) continue;
    const std::string output = kPresent + spec.name.substr(sizeof(kPast) - 1);
    bool fits = std::any_of(graph.outputs.begin(), graph.outputs.end(), [&](const TensorSpec& written) {
      return written.name == output && written.dtype == spec.dtype && written.shape.size() == spec.shape.size();
    });
    if (IsState(spec.name)) {
      fits = fits && spec.shape.size() > 1;
      int64_t count = 1;
      for (size_t axis = 1; fits && axis < spec.shape.size(); ++axis) {
        fits = spec.shape[axis] >= 1 && spec.shape[axis] <= most / count;
        count *= spec.shape[axis];
      }
    } else {
      fits = fits && spec.shape.size() == 4;
      for (size_t axis = 1; fits && axis < 4; axis += 2) fits = spec.shape[axis] >= 1 && spec.shape[axis] <= 4096;
    }
    if (!fits) throw ArtifactError("A manifest's '" + spec.name + "' has another shape than a cache's tensor.", kAgain);
  }
}

Manifest Read(const Json& table) {
  Manifest manifest;
  manifest.model_type = table.at("model_type").get<std::string>();
  manifest.hidden_size = Within(table, "hidden_size", 1, 1 << 20);
  manifest.vocab_size = Within(table, "vocab_size", 1, 1 << 24);
  manifest.max_context = Within(table, "max_context", 1, int64_t{1} << 31);
  if (!table.at("image_token_id").is_null())
    manifest.image_token_id = Within(table, "image_token_id", 0, int64_t{1} << 31);
  const Json& kv = table.at("kv");
  manifest.kv_layers = Within(kv, "layers", 1, 4096);
  Within(kv, "heads", 1, 4096);  // of the first layer; the graph's entry has the shapes of all
  Within(kv, "head_dim", 1, 4096);
  manifest.kv_in_place = kv.at("in_place").get<bool>();
  manifest.generation = Settings(table.at("generation"), manifest.vocab_size);
  for (const auto& item : table.at("graphs").items()) {
    GraphFile& graph = manifest.graphs[item.key()];
    ReadGraph(item.value(), graph);
    ReadProfiles(item.value().at("profiles"), graph);
  }
  CheckCache(manifest.graphs.at("language"));
  if (const Json& picture = table.at("picture"); !picture.is_null()) {
    manifest.picture.emplace();
    ReadGraph(picture, *manifest.picture);
    manifest.picture->placeholder_id = Within(picture, "placeholder_id", 0, manifest.vocab_size - 1);
    manifest.picture->max_pixels = Within(picture, "max_pixels", 1, 1 << 26);
    manifest.picture->max_side = Within(picture, "max_side", 1, 1 << 16);
    for (const TensorSpec& spec : manifest.picture->inputs)
      manifest.picture->counts_pictures = manifest.picture->counts_pictures || spec.name == "pictures";
    if (const auto label = picture.find("label"); label != picture.end() && !label->is_null())
      manifest.picture->label = Label(*label, manifest.vocab_size);
    if (!picture.at("max_aspect").is_null()) manifest.picture->max_aspect = Within(picture, "max_aspect", 1, 1 << 16);
  }
  return manifest;
}

Json ParseTable(const std::string& text, const std::string& where) {
  Json table = ParseJsonTable(text, where, kAgain);
  const auto version = table.find("format_version");
  if (version == table.end() || !version->is_number_integer() || version->get<int64_t>() != kVersion) {
    throw ArtifactError("'" + where + "' has another format version than " + std::to_string(kVersion) +
                            ", which this library reads.",
                        "Export the model again, or install the version that wrote it.");
  }
  const Json* graphs = table.contains("graphs") ? &table["graphs"] : nullptr;
  if (graphs == nullptr || !graphs->is_object() || !graphs->contains("language"))
    throw ArtifactError("'" + where + "' describes no model that writes text.", "Give the folder of one that does.");
  return table;
}

// The last size of a profile's attention mask, which is how many tokens it takes.
int64_t Tokens(const GraphFile& graph, const std::string& profile, int64_t most) {
  if (const auto shapes = graph.largest.find(profile); shapes != graph.largest.end()) {
    const auto mask = shapes->second.find("attention_mask");
    if (mask != shapes->second.end() && mask->second.size() == 2 && mask->second[1] >= 1 && mask->second[1] <= most)
      return mask->second[1];
  }
  throw ArtifactError("The engines' profile '" + profile + "' has no number of tokens.", kAgain);
}

// What engines of fixed sizes take. Throws ArtifactError if their cache is of another size than their context.
EngineLimits Limits(const Manifest& manifest) {
  const GraphFile& language = manifest.graphs.at("language");
  const EngineLimits limits{Tokens(language, "decode", manifest.max_context), Tokens(language, "prefill", manifest.max_context)};
  for (const TensorSpec& spec : language.inputs) {
    if (spec.name.rfind(kPast, 0) == 0 && !IsState(spec.name) && spec.shape[2] != -1 && spec.shape[2] != limits.context)
      throw ArtifactError("The engines' cache '" + spec.name + "' has another size than their context.", kAgain);
  }
  return limits;
}

}  // namespace

bool IsState(const std::string& name) { return !EndsWith(name, ".key") && !EndsWith(name, ".value"); }

std::vector<int64_t> PictureLabel::Ids(size_t number) const {
  std::vector<int64_t> ids = before;
  for (const char digit : std::to_string(number)) ids.push_back(digits[static_cast<size_t>(digit - '0')]);
  ids.insert(ids.end(), after.begin(), after.end());
  return ids;
}

int64_t Manifest::EmbedsWidth() const {
  for (const TensorSpec& spec : graphs.at("language").inputs) {
    if (spec.name == "inputs_embeds" && !spec.shape.empty() && spec.shape.back() >= hidden_size) return spec.shape.back();
  }
  return hidden_size;
}

int64_t Manifest::PositionAxes() const {
  for (const TensorSpec& spec : graphs.at("language").inputs) {
    if (spec.name == "position_ids") return spec.shape.size() == 3 ? spec.shape[0] : 1;
  }
  return 1;
}

// nlohmann's exceptions are about values of another kind than a manifest has.
Manifest ParseManifest(const std::string& text, const std::string& where) {
  try {
    const Json table = ParseTable(text, where);
    CheckSeal(table, where, kAgain);
    return Read(table);
  } catch (const Json::exception&) {
    throw Damaged(where, "a value is missing or of another kind");
  }
}

Manifest ReadManifest(const fs::path& folder) {
  const fs::path path = folder / "manifest.json";
  std::error_code failed;
  if (!fs::is_regular_file(path, failed)) {
    if (failed && failed != std::errc::no_such_file_or_directory && failed != std::errc::not_a_directory)
      throw ArtifactError("'" + folder.string() + "' cannot be read: " + failed.message() + ".", "Check who may read it.");
    throw ArtifactError("'" + folder.string() + "' is not an ONNX or engine folder: manifest.json is missing.",
                        "Give the output folder of 'qe-edge export' or 'qe-edge build'.");
  }
  const std::string text = ReadFile(path, kMaxManifest, kAgain);
  Manifest manifest = ParseManifest(text, path.string());
  try {
    const Json table = ParseTable(text, path.string());
    const Json& files = table.at("files");
    std::vector<std::string> wanted = {"embedding.safetensors", "config.json", "tokenizer.json"};
    for (const auto& graph : manifest.graphs) wanted.push_back(graph.second.file);
    if (manifest.picture) wanted.push_back(manifest.picture->file);
    if (fs::exists(folder / "chat.json")) wanted.push_back("chat.json");
    for (const std::string& name : wanted) {
      if (!files.contains(name)) throw Damaged(folder.string(), "manifest.json lists no file '" + name + "'");
    }
    CheckFiles(folder, files);
    if (!table.at("onnx").is_null() || fs::exists(folder / kEngineInfo))
      manifest.engine = ReadEngineInfo(folder, table.at("digest").get<std::string>());
    if (manifest.engine && manifest.engine->HasLimits()) manifest.limits = Limits(manifest);
  } catch (const Json::exception&) {
    throw Damaged(path.string(), "a value is missing or of another kind");
  } catch (const fs::filesystem_error& error) {
    throw ArtifactError("'" + folder.string() + "' cannot be read: " + error.code().message() + ".", kAgain);
  }
  return manifest;
}

}  // namespace qe_edge
