#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "model/chat.h"
#include "model/embedding.h"
#include "model/manifest.h"
#include "model/picture.h"
#include "tokenizer/tokenizer.h"

namespace qe_edge {

struct LoadOptions {
  std::string onnxruntime;  // path of its library; empty for where the system finds it
  int threads = 0;          // 0 for one per core
  int64_t max_context = 0;  // tokens of prompt and answer; 0 for what the model takes
  GpuOptions gpu;           // for engines of a GPU
};

// What stands in a prompt for a picture.
struct PictureTokens {
  std::string key;
  std::vector<int64_t> ids;
  Tensor positions;  // int64 [axes, ids]
  Tensor features;   // float32 [features, width], one for every image token of the ids
};

// A folder that was opened. Nothing in it changes, so that threads may share it.
class Core {
 public:
  // Checks all files and opens the graphs; throws an Error.
  Core(const std::filesystem::path& folder, const LoadOptions& options);

  // Prepares and encodes a picture of a prompt that has so many.
  PictureTokens Encode(const Picture& picture, size_t count) const;

  // What a picture's tokens and features depend on.
  std::string PictureKey(const Picture& picture, size_t count) const;

  // Whether a picture becomes something else beside others.
  bool counts_pictures() const { return manifest.picture && manifest.picture->counts_pictures; }

  const Manifest manifest;
  const int64_t max_context;
  const std::shared_ptr<const Tokenizer> tokenizer;
  const Chat chat;
  const TokenEmbedding embedding;

  const Graph& language() const { return *language_; }

  // Tokens of a cache that is to hold so many: engines have one size.
  int64_t Capacity(int64_t wanted) const;

 private:
  std::unique_ptr<const Graph> language_, visual_, merger_, preprocess_;
};

}  // namespace qe_edge
