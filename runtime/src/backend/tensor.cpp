#include <algorithm>
#include <cstdlib>
#include <limits>

#include "backend/backend.h"
#include "base/error.h"

namespace qe_edge {
namespace {

constexpr size_t kAlignment = 64;

size_t ElementBytes(const std::string& dtype) {
  return dtype == "int64" ? 8 : dtype == "float32" ? 4 : dtype == "float16" ? 2 : 1;
}

}  // namespace

int64_t Tensor::Count() const {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

size_t Tensor::Bytes() const { return BytesOf(dtype, shape); }

size_t BytesOf(const std::string& dtype, const std::vector<int64_t>& shape) {
  size_t bytes = ElementBytes(dtype);
  for (const int64_t size : shape) {
    if (size < 0 || (size > 0 && bytes > std::numeric_limits<size_t>::max() / 2 / static_cast<size_t>(size)))
      throw InputError("A tensor has a wrong size.", "Use a smaller picture or a shorter prompt.");
    bytes *= static_cast<size_t>(size);
  }
  return bytes;
}

Tensor Zeros(const std::string& dtype, std::vector<int64_t> shape) {
  const size_t bytes = BytesOf(dtype, shape);
  const size_t rounded = (bytes / kAlignment + 1) * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, rounded);
  if (memory == nullptr) {
    throw Error(QE_ERROR_RESOURCE, "There is no memory for " + std::to_string(bytes >> 20) + " MiB.",
                "Choose a smaller max_context, or a smaller picture.");
  }
  std::fill_n(static_cast<char*>(memory), bytes, char{0});
  return {dtype, std::move(shape), std::shared_ptr<void>(memory, std::free)};
}

}  // namespace qe_edge
