#include "model/core.h"

#include <algorithm>

#include "base/files.h"
#include "model/folder.h"

namespace qe_edge {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxTokenizer = 64 << 20;
constexpr size_t kMaxChat = 16 << 20;
constexpr char kChat[] = "chat.json";

Manifest Runnable(const fs::path& folder) {
  Manifest manifest = ReadManifest(folder);
  if (!manifest.kv_in_place && !manifest.limits) {
    throw Error(QE_ERROR_TARGET, "A '" + manifest.model_type + "' model's cache is not written in place, as C++ has it.",
                "Run it from Python.");
  }
  if (manifest.PositionAxes() != 1 && manifest.PositionAxes() != 3)
    throw ArtifactError("The positions of a '" + manifest.model_type + "' model have an unknown form.", kAgain);
  return manifest;
}

int64_t Context(const Manifest& manifest, int64_t asked) {
  if (manifest.limits && asked > manifest.limits->context && asked <= manifest.max_context) {
    throw InputError("The engines were built for " + std::to_string(manifest.limits->context) + " tokens of prompt and answer, not " +
                         std::to_string(asked) + ".",
                     "Choose a smaller max_context, or build them with --max-context " + std::to_string(asked) + ".");
  }
  if (asked < 0 || asked > manifest.max_context) {
    throw InputError("The model remembers " + std::to_string(manifest.max_context) + " tokens, not " +
                         std::to_string(asked) + ".", "Choose a smaller max_context, or 0.");
  }
  if (asked == 0) return manifest.limits ? manifest.limits->context : manifest.max_context;
  return asked;
}

std::shared_ptr<const Tokenizer> ReadTokenizer(const fs::path& folder) {
  const fs::path path = folder / "tokenizer.json";
  return std::make_shared<const Tokenizer>(ReadFile(path, kMaxTokenizer, kAgain), path.string());
}

Chat ReadChat(const fs::path& folder) {
  const fs::path path = folder / kChat;
  if (!fs::exists(path)) throw ArtifactError("'" + folder.string() + "' has no chat.json.", kAgain);
  return Chat(ReadFile(path, kMaxChat, kAgain), path.string());
}

const Tensor& Named(const Tensors& tensors, const std::string& name, const std::string& dtype, size_t axes) {
  const auto found = tensors.find(name);
  if (found == tensors.end() || found->second.dtype != dtype || found->second.shape.size() != axes)
    throw ArtifactError("A graph computes no '" + name + "' of " + std::to_string(axes) + " axes.", kAgain);
  return found->second;
}

// Inputs of every run of the visual encoder: those of a further run have names that end in a point and its number.
std::map<std::string, Tensors> VisualRuns(const Tensors& prepared) {
  std::map<std::string, Tensors> runs;
  for (const auto& [name, tensor] : prepared) {
    const size_t point = name.find('.');
    runs[point == std::string::npos ? "" : name.substr(point + 1)].emplace(name.substr(0, point), tensor);
  }
  return runs;
}

// Tensors one behind the other along their first axis.
Tensor Joined(const std::vector<Tensor>& parts) {
  if (parts.empty()) throw ArtifactError("A picture has no images.", kAgain);
  if (parts.size() == 1) return parts[0];
  std::vector<int64_t> shape = parts[0].shape;
  for (size_t number = 1; number < parts.size(); ++number) {
    const Tensor& part = parts[number];
    const bool fits = part.dtype == "float32" && part.dtype == parts[0].dtype && !shape.empty() &&
                      part.shape.size() == shape.size() &&
                      std::equal(shape.begin() + 1, shape.end(), part.shape.begin() + 1);
    if (!fits) throw ArtifactError("The visual encoder's runs for a picture do not fit together.", kAgain);
    shape[0] += part.shape[0];
  }
  const Tensor joined = Zeros("float32", shape);
  float* end = joined.As<float>();
  for (const Tensor& part : parts) end = std::copy_n(part.As<float>(), part.Count(), end);
  return joined;
}

}  // namespace

Core::Core(const fs::path& folder, const LoadOptions& options)
    : manifest(Runnable(folder)),
      max_context(Context(manifest, options.max_context)),
      tokenizer(ReadTokenizer(folder)),
      chat(ReadChat(folder)),
      embedding(folder / "embedding.safetensors", manifest.vocab_size, manifest.hidden_size,
                manifest.EmbedsWidth()) {
  if (options.threads < 0) throw InputError("A negative number of threads cannot run anything.", "Choose at least 1, or 0.");
  const std::shared_ptr<const Backend> engines = manifest.limits ? OpenTensorRt(*manifest.engine, options.gpu) : nullptr;
  const bool sees = manifest.picture && manifest.graphs.count("visual") > 0 && manifest.graphs.count("merger") > 0;
  // pictures are prepared by ONNX Runtime, whatever runs the engines
  const std::shared_ptr<const Backend> graphs = sees || !engines ? OpenOnnxRuntime(options.onnxruntime) : nullptr;
  const auto open = [&](const char* name, bool frugal) {
    return (engines ? engines : graphs)->Open(folder, manifest.graphs.at(name), options.threads, frugal);
  };
  language_ = open("language", false);
  if (!sees) return;
  visual_ = open("visual", true);
  merger_ = open("merger", true);
  preprocess_ = graphs->Open(folder, *manifest.picture, options.threads, true);
}

int64_t Core::Capacity(int64_t wanted) const {
  if (!manifest.limits) return std::min(wanted, max_context);
  return manifest.kv_in_place ? manifest.limits->context : max_context;
}

std::string Core::PictureKey(const Picture& picture, size_t count) const {
  return counts_pictures() && count > 1 ? picture.key + " beside others" : picture.key;
}

PictureTokens Core::Encode(const Picture& picture, size_t count) const {
  if (!preprocess_) throw InputError("This model's pictures cannot be prepared in C++.", "Leave the pictures out, or use Python.");
  Tensors inputs{{"image", picture.rgb}};
  if (counts_pictures()) {
    const Tensor number = Zeros("int64", {});
    *number.As<int64_t>() = static_cast<int64_t>(count);
    inputs.emplace("pictures", number);
  }
  const Tensors prepared = preprocess_->Run(inputs, {});
  const Tensor& ids = Named(prepared, "placeholder_ids", "int64", 1);
  PictureTokens tokens{PictureKey(picture, count), {ids.As<int64_t>(), ids.As<int64_t>() + ids.Count()},
                       Named(prepared, "placeholder_positions", "int64", 2), {}};
  if (tokens.ids.empty()) throw InputError("A picture is too narrow for the model.", "Crop it.");
  std::vector<Tensor> hidden;
  for (const auto& [number, run] : VisualRuns(prepared)) {
    const auto pixels = run.find("pixel_values");
    if (pixels != run.end() && pixels->second.Count() == 0) continue;  // a run without images
    hidden.push_back(visual_->Run(run, {}).begin()->second);
  }
  const GraphFile& merger = manifest.graphs.at("merger");
  const Tensors merged = merger_->Run({{merger.inputs.at(0).name, Joined(hidden)}}, {});
  tokens.features = Named(merged, merger.outputs.at(0).name, "float32", 2);
  const auto features = std::count(tokens.ids.begin(), tokens.ids.end(), manifest.image_token_id.value_or(-1));
  if (tokens.positions.shape[0] != manifest.PositionAxes() || tokens.positions.shape[1] != ids.Count() ||
      tokens.features.shape[0] != features || tokens.features.shape[1] != manifest.EmbedsWidth())
    throw ArtifactError("A picture's tokens and features do not fit together.", kAgain);
  return tokens;
}

}  // namespace qe_edge
