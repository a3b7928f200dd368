#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "model/engine_info.h"

namespace qe_edge {

constexpr char kPast[] = "past_key_values.", kPresent[] = "present.";  // a cache's inputs and outputs begin so

// Whether a cache's tensor has fixed sizes and stands for all tokens so far; keys and values grow with the context.
bool IsState(const std::string& name);

// An input or output of a graph. Sizes that depend on a call are -1.
struct TensorSpec {
  std::string name, dtype;
  std::vector<int64_t> shape;
};

struct GraphFile {
  std::string file;
  std::vector<TensorSpec> inputs, outputs;
  std::map<std::string, std::map<std::string, std::vector<int64_t>>> largest;  // of every profile's inputs
};

// The largest sizes that engines were built for.
struct EngineLimits {
  int64_t context = 0;  // tokens of prompt and answer
  int64_t prompt = 0;   // tokens that are read at once
};

// Tokens that say the number of a picture in its prompt.
struct PictureLabel {
  std::vector<int64_t> before, digits, after;

  std::vector<int64_t> Ids(size_t number) const;
};

// The graph that prepares one picture.
struct PictureFile : GraphFile {
  int64_t placeholder_id = 0, max_pixels = 0, max_side = 0;
  std::optional<int64_t> max_aspect;
  std::optional<PictureLabel> label;
  bool counts_pictures = false;  // whether a picture becomes something else beside others: the graph has their number
};

constexpr double kMinPenalty = 0.01, kMaxPenalty = 100;  // beyond them logits in float32 overflow

// How answers are decoded where a caller says nothing else.
struct GenerationSettings {
  std::vector<int64_t> eos_token_ids, suppress_tokens, begin_suppress_tokens;
  double repetition_penalty = 1;
  int64_t no_repeat_ngram_size = 0, min_length = 0, min_new_tokens = 0;
  bool do_sample = false;
  double temperature = 1, top_p = 1, min_p = 0;
  int64_t top_k = 50;
};

// manifest.json of an ONNX or engine folder.
struct Manifest {
  std::string model_type;
  int64_t hidden_size = 0, vocab_size = 0, max_context = 0;
  std::optional<int64_t> image_token_id;
  int64_t kv_layers = 0;
  bool kv_in_place = false;
  GenerationSettings generation;
  std::map<std::string, GraphFile> graphs;  // "language", and "visual" and "merger" where the model reads pictures
  std::optional<PictureFile> picture;
  std::optional<EngineInfo> engine;  // of an engine folder
  std::optional<EngineLimits> limits;  // of engines that have some

  int64_t EmbedsWidth() const;   // of the language graph's `inputs_embeds`
  int64_t PositionAxes() const;  // 3 with M-RoPE, else 1
};

// The manifest of a folder, its seal checked, and every file's place, size and SHA-256.
// Throws ArtifactError if the folder is none of ours, is damaged, or is of another version or for another backend.
Manifest ReadManifest(const std::filesystem::path& folder);

// The manifest in a text, its seal checked. `where` names it.
Manifest ParseManifest(const std::string& text, const std::string& where);

}  // namespace qe_edge
