#pragma once

#include <cstdint>
#include <filesystem>

#include "base/files.h"

namespace qe_edge {

// embedding.safetensors: rows of the token embedding, gathered from the mapped file.
class TokenEmbedding {
 public:
  // Throws ArtifactError if the file is damaged, or is not [at least rows, width or widest] of F32, F16, BF16, or of I8
  // with a float for every row. A table of the second width holds further embeddings of every token behind the first.
  TokenEmbedding(const std::filesystem::path& path, int64_t rows, int64_t width, int64_t widest);

  // Writes the row of a token, `width` or `widest` floats.
  void Copy(int64_t token, float* out) const;

 private:
  enum class Kind { kF32, kF16, kBF16, kI8 };

  MappedFile file_;
  int64_t rows_, width_;
  Kind kind_ = Kind::kF32;
  const char* table_ = nullptr;
  const char* scales_ = nullptr;  // of I8, maybe unaligned
};

}  // namespace qe_edge
