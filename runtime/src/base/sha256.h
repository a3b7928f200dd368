#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace qe_edge {

// SHA-256 (FIPS 180-4) of bytes that come in parts.
class Sha256 {
 public:
  void Add(const void* data, size_t size);
  std::string Hex();  // ends it: 64 hexadecimal digits

  static std::string Of(std::string_view bytes);

 private:
  void Block(const uint8_t* block);

  uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  uint8_t pending_[64];
  uint64_t bytes_ = 0;
};

}  // namespace qe_edge
