#include "model/embedding.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <string_view>

#include "base/json.h"
#include "model/folder.h"

namespace qe_edge {
namespace {

constexpr size_t kMaxHeader = 1 << 20;
constexpr std::string_view kTypes[] = {"F32", "F16", "BF16", "I8"};  // in the order of TokenEmbedding::Kind
constexpr uint64_t kSizes[] = {4, 2, 2, 1};

float FromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

float FromHalf(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 31, fraction = half & 0x3FF;
  if (exponent == 31) return FromBits(sign | 0x7F800000 | fraction << 13);
  if (exponent != 0) return FromBits(sign | (exponent + 112) << 23 | fraction << 13);
  const float small = static_cast<float>(fraction) * 0x1p-24f;  // exact
  return sign ? -small : small;
}

// The bytes of a tensor, as its header places them among those of the file. Throws ArtifactError if they are not `size`.
const char* Bytes(const Json& tensor, std::string_view data, uint64_t size, const std::string& where) {
  const auto offsets = tensor.at("data_offsets").get<std::vector<uint64_t>>();
  if (offsets.size() != 2 || offsets[0] > offsets[1] || offsets[1] > data.size() || offsets[1] - offsets[0] != size)
    throw ArtifactError("'" + where + "' is damaged: a tensor does not lie inside it.", kAgain);
  return data.data() + offsets[0];
}

}  // namespace

TokenEmbedding::TokenEmbedding(const std::filesystem::path& path, int64_t rows, int64_t width, int64_t widest)
    : file_(path), rows_(rows), width_(width) {
  const std::string where = path.string();
  const std::string_view bytes = file_.bytes();
  uint64_t length = 0;
  if (bytes.size() >= 8) {
    for (int byte = 7; byte >= 0; --byte) length = length << 8 | static_cast<unsigned char>(bytes[static_cast<size_t>(byte)]);
  }
  if (bytes.size() < 8 || length > kMaxHeader || length > bytes.size() - 8)
    throw ArtifactError("'" + where + "' is no safetensors file.", kAgain);
  const std::string_view data = bytes.substr(8 + length);
  const auto least = static_cast<uint64_t>(rows);
  try {
    const Json header = ParseJsonTable(bytes.substr(8, length), where, kAgain);
    const Json& tensor = header.at("embedding");
    const auto dtype = tensor.at("dtype").get<std::string>();
    const auto shape = tensor.at("shape").get<std::vector<uint64_t>>();
    const auto kind = std::find(std::begin(kTypes), std::end(kTypes), dtype);
    if (shape.size() == 2 && shape[1] == static_cast<uint64_t>(widest)) width_ = widest;
    const auto columns = static_cast<uint64_t>(width_);
    // a file holds at least a byte for every number, so that no product below overflows
    if (kind == std::end(kTypes) || shape.size() != 2 || shape[0] < least || shape[1] != columns ||
        shape[0] > data.size() / columns) {
      throw ArtifactError("'" + where + "' is damaged: it should have " + std::to_string(rows) + " rows of " +
                              std::to_string(width_) + ".", kAgain);
    }
    kind_ = static_cast<Kind>(kind - kTypes);
    table_ = Bytes(tensor, data, shape[0] * columns * kSizes[kind - kTypes], where);
    if (kind_ == Kind::kI8) {
      const Json& scales = header.at("scales");
      if (scales.at("dtype") != "F32" || scales.at("shape") != std::vector<uint64_t>{shape[0]})
        throw ArtifactError("'" + where + "' is damaged: it should have a scale for every row.", kAgain);
      scales_ = Bytes(scales, data, shape[0] * sizeof(float), where);
    }
  } catch (const Json::exception&) {
    throw ArtifactError("'" + where + "' is damaged: its header is wrong.", kAgain);
  }
}

void TokenEmbedding::Copy(int64_t token, float* out) const {
  if (token < 0 || token >= rows_)
    throw InputError("Token " + std::to_string(token) + " is outside the vocabulary.", "Give ids of the tokenizer.");
  const auto count = static_cast<size_t>(width_);
  const size_t first = static_cast<size_t>(token) * count;
  if (kind_ == Kind::kF32) {
    std::memcpy(out, table_ + first * 4, count * 4);
    return;
  }
  if (kind_ == Kind::kI8) {
    float scale;
    std::memcpy(&scale, scales_ + static_cast<size_t>(token) * sizeof(scale), sizeof(scale));
    for (size_t column = 0; column < count; ++column)
      out[column] = static_cast<float>(static_cast<signed char>(table_[first + column])) * scale;
    return;
  }
  for (size_t column = 0; column < count; ++column) {
    uint16_t stored;
    std::memcpy(&stored, table_ + (first + column) * 2, 2);
    out[column] = kind_ == Kind::kF16 ? FromHalf(stored) : FromBits(static_cast<uint32_t>(stored) << 16);
  }
}

}  // namespace qe_edge
