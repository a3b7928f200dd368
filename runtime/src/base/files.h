#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace qe_edge {

// A file mapped into memory, read-only.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path);  // throws ArtifactError if it cannot be read
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::string_view bytes() const { return {static_cast<const char*>(data_), size_}; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// The content of a regular file of at most `limit` bytes. Throws ArtifactError for any other.
std::string ReadFile(const std::filesystem::path& path, size_t limit, const std::string& remedy);

}  // namespace qe_edge
