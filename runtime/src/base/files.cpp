#include "base/files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/error.h"

namespace qe_edge {
namespace {

// An open file that closes itself.
struct Opened {
  explicit Opened(const std::filesystem::path& path, const std::string& remedy)
      : number(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (number < 0) throw ArtifactError("'" + path.string() + "' cannot be read: " + std::strerror(errno) + ".", remedy);
    if (fstat(number, &found) != 0 || !S_ISREG(found.st_mode)) {
      close(number);
      throw ArtifactError("'" + path.string() + "' is not a file.", remedy);
    }
  }
  ~Opened() { close(number); }
  Opened(const Opened&) = delete;
  Opened& operator=(const Opened&) = delete;

  int number;
  struct stat found {};
};

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) {
  const std::string remedy = "Export or build the model again.";
  const Opened file(path, remedy);
  size_ = static_cast<size_t>(file.found.st_size);
  if (size_ == 0) return;
  void* mapped = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.number, 0);
  if (mapped == MAP_FAILED)
    throw ArtifactError("'" + path.string() + "' cannot be mapped: " + std::strerror(errno) + ".", remedy);
  data_ = mapped;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(data_, size_);
}

std::string ReadFile(const std::filesystem::path& path, size_t limit, const std::string& remedy) {
  const Opened file(path, remedy);
  const auto size = static_cast<size_t>(file.found.st_size);
  if (size > limit) {
    throw ArtifactError("'" + path.string() + "' has " + std::to_string(size) + " bytes; more than " +
                            std::to_string(limit) + " are not read.",
                        remedy);
  }
  std::string content(size, '\0');
  size_t done = 0;
  while (done < size) {
    const ssize_t got = read(file.number, content.data() + done, size - done);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) throw ArtifactError("'" + path.string() + "' cannot be read to its end.", remedy);
    done += static_cast<size_t>(got);
  }
  return content;
}

}  // namespace qe_edge
