#include "self_test.h"

#include <math.h>

#include <vector>

namespace qe {
namespace {

// Four chunks of K, so that decode can split them over blocks; one column block, one rank tile.
constexpr int kK = 512, kN = 32, kRank = 16;
constexpr char kNotRead[] = "The self-test could not read its results from the GPU. Run plugins/device_check.sh.";
constexpr char kNoMemory[] = "The self-test found no GPU memory. Free some and try again.";

// Small integers and powers of two, so that every float16 value below is exact and only y is rounded.
int Weight(int k, int n, int bits) { return (k * 7 + n * 5 + k / 16) % (1 << bits) - (1 << (bits - 1)); }
int Activation(int m, int k) { return k == 3 ? 127 : (m * 31 + k * 11) % 201 - 100; }  // the maximum makes the scale 1
// Low-rank factors are small integers too, with one scale. Those of `down` have magnitudes that sum to 16 in a column.
constexpr float kDownScale = 0.25f, kUpScale = 0.125f;
int Down(int k, int r) {
  constexpr int kCodes[kK / kRank] = {1, 0, 0, -8, 0, 0, 0, 0, 0, 7};
  return k % kRank == r ? kCodes[(k / kRank + r) % (kK / kRank)] : 0;
}
int Up(int r, int n) { return (r * 3 + n * 5) % 16 - 8; }
// Scales of groups differ, zero points too; without groups or zero points they are 1/64 and 0.
constexpr float kScale = 0.015625f;
float GroupScale(int group) { return kScale / static_cast<float>(1 << group % 3); }
int Zero(int group, int n, int bits) { return (group * 5 + n * 3) % (1 << bits) - (1 << (bits - 1)); }

// What a layer of the self-test is like. 16-bit activations rest on tensor cores that multiply subnormal fp16 numbers,
// with scales of groups and without.
struct Kind {
  int act_bits, group_size;
  bool zeros;
  int bits, adapter_bits;
};
constexpr Kind kKinds[] = {{8, -1, false, 4, 16}, {8, 64, true, 4, 4},  {0, -1, false, 4, 16}, {0, 128, true, 4, 4},
                           {8, 64, false, 3, 4},  {0, -1, false, 3, 16}, {0, 128, true, 3, 8}};
int GroupOf(const Kind& kind, int k) { return kind.group_size < 0 ? 0 : k / kind.group_size; }
int Centred(const Kind& kind, int k, int n) {
  return Weight(k, n, kind.bits) - (kind.zeros ? Zero(GroupOf(kind, k), n, kind.bits) : 0);
}

uint16_t Half(float v) {
  if (v == 0.f) return 0;
  int exponent = 0;
  const float mantissa = frexpf(fabsf(v), &exponent);  // 0.5 to 1
  const int bits = static_cast<int>(mantissa * 2048.f) - 1024;
  return static_cast<uint16_t>((v < 0 ? 0x8000 : 0) | ((exponent + 14) << 10) | bits);
}

float Value(uint16_t h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  const float magnitude = exponent ? ldexpf(static_cast<float>(1024 + mantissa), exponent - 25)
                                   : ldexpf(static_cast<float>(mantissa), -24);
  return exponent == 31 ? NAN : (h & 0x8000 ? -magnitude : magnitude);
}

// The orders of prepack/layout.py, stated a second time.
std::vector<uint8_t> Bytes(const std::vector<uint32_t>& words) {
  std::vector<uint8_t> bytes;
  for (const uint32_t w : words)
    for (int byte = 0; byte < 4; ++byte) bytes.push_back(static_cast<uint8_t>(w >> (8 * byte)));
  return bytes;
}

std::vector<uint8_t> PackWeight3(const Kind& kind) {
  constexpr int kBits[] = {0, 3, 6, 10, 13};  // of a code in a half word
  std::vector<uint32_t> words(kK * kN * 3 / 32, 0);
  for (int k = 0; k < kK; ++k)
    for (int n = 0; n < kN; ++n) {
      const int row = k % 128, pair = kind.act_bits == 0 ? row % 8 / 2 : row % 16 / 4;
      const uint32_t code = static_cast<uint32_t>(kind.act_bits == 0 ? Weight(k, n, 3) + 4 : Weight(k, n, 3)) & 7u;
      const auto put = [&](int word, int bit, uint32_t value) {
        words[static_cast<size_t>(((k / 128 * 3 + word) * 32 + n % 8 * 4 + pair) * 4 + n / 8)] |= value << bit;
      };
      if (kind.act_bits == 0) {
        const int r = row / 8, at = row % 2 * 16;
        if (r < 15) put(r / 5, at + kBits[r % 5], code);
        for (int i = 0; r == 15 && i < 3; ++i) put(i, at + 9, code >> i & 1u);
      } else {
        const int r = row / 64 * 4 + row % 64 / 16, at = row % 4 * 8;
        if (r < 6) put(r / 2, at + (r % 2 ? 2 : 5), code);
        if (r == 6) put(0, at, code >> 1), put(1, at + 1, code & 1u);
        if (r == 7) put(1, at, code >> 2), put(2, at, code & 3u);
      }
    }
  return Bytes(words);
}

std::vector<uint8_t> PackWeight(const Kind& kind) {
  if (kind.bits == 3) return PackWeight3(kind);
  std::vector<uint32_t> words(kK * kN / 8, 0);
  for (int k = 0; k < kK; ++k)
    for (int n = 0; n < kN; ++n) {
      const int row = k % 128;
      int word, nibble, pair;
      if (kind.act_bits == 0) {
        word = row / 32, pair = row % 8 / 2;
        nibble = (row % 32 / 16) * 2 + (row % 16 / 8) + (row % 2) * 4;
      } else {
        word = row % 64 / 16, pair = row % 16 / 4;
        nibble = row % 4 * 2 + row / 64;
      }
      const bool offset = kind.act_bits == 0 || kind.zeros;
      const uint32_t value = static_cast<uint32_t>(offset ? Weight(k, n, 4) + 8 : Weight(k, n, 4)) & 15u;
      words[((k / 128 * 4 + n / 8) * 32 + n % 8 * 4 + pair) * 4 + word] |= value << (nibble * 4);
    }
  for (uint32_t& w : words)
    if (kind.act_bits != 0 && kind.zeros) w = w << 3 | w >> 29;
  return Bytes(words);
}

// Scales in units of 2^-20, which puts the largest at 2^14, and zero points.
int Groups(const Kind& kind) { return kind.group_size < 0 ? 1 : kK / kind.group_size; }
std::vector<uint16_t> PackScales(const Kind& kind) {
  std::vector<uint16_t> packed;
  for (int group = 0; group < Groups(kind); ++group)
    packed.insert(packed.end(), kN, Half(GroupScale(group) * 1048576.f));
  return packed;
}
std::vector<uint8_t> PackZeros(const Kind& kind) {
  std::vector<uint8_t> packed(static_cast<size_t>(Groups(kind)) * kN);
  for (int group = 0; group < Groups(kind); ++group)
    for (int n = 0; n < kN; ++n)
      packed[static_cast<size_t>((group * 8 + n % 8) * 4 + n / 8)] =
          static_cast<uint8_t>(((kind.zeros ? Zero(group, n, kind.bits) : 0) + (1 << (kind.bits - 1))) *
                               (kind.act_bits ? 8 : 1));
  return packed;
}

// Factors as their bytes: fp16 values, or integers, of 4 bits with 8 added.
std::vector<uint8_t> FactorBytes(const std::vector<int>& codes, int bits, float scale) {
  std::vector<uint8_t> bytes;
  for (size_t i = 0; i < codes.size(); ++i) {
    if (bits == 16) {
      const uint16_t half = Half(static_cast<float>(codes[i]) * scale);
      bytes.push_back(static_cast<uint8_t>(half)), bytes.push_back(static_cast<uint8_t>(half >> 8));
    } else if (bits == 8) {
      bytes.push_back(static_cast<uint8_t>(codes[i]));
    } else if (i % 2) {
      bytes.back() = static_cast<uint8_t>(bytes.back() | (codes[i] + 8) << 4);
    } else {
      bytes.push_back(static_cast<uint8_t>(codes[i] + 8));
    }
  }
  return bytes;
}

// Where value `half` of register `reg` of eight of a lane stands; of 4 bits, the halves are nibbles that are 4 apart.
int Place(int bits, int reg, int half) { return bits == 4 ? reg / 4 * 8 + reg % 4 + half * 4 : reg * 2 + half; }

std::vector<uint8_t> PackDown(int bits) {
  std::vector<int> packed(kK * kRank);
  for (int k = 0; k < kK; ++k)
    for (int r = 0; r < kRank; ++r) {
      const int pair = k % 32 / 8, step = k % 8 / 4, lane = r % 8 * 4 + pair, reg = k % 4 / 2 * 2 + r / 8;
      const int at = bits == 16 ? ((k / 32 * 2 + step) * 32 + lane) * 8 + reg * 2 + k % 2
                                : (k / 32 * 32 + lane) * 16 + Place(bits, step * 4 + reg, k % 2);
      packed[static_cast<size_t>(at)] = Down(k, r);
    }
  return FactorBytes(packed, bits, kDownScale);
}

std::vector<uint8_t> PackUp(int bits) {
  std::vector<int> packed(kRank * kN);
  for (int r = 0; r < kRank; ++r)
    for (int n = 0; n < kN; ++n) {
      const int lane = n % 8 * 4 + r % 8 / 2;
      const int at = bits == 4 ? (n / 16 * 32 + lane) * 8 + Place(bits, n % 16 / 8 * 2 + r / 8, r % 2)
                               : (n / 8 * 32 + lane) * 4 + r / 8 * 2 + r % 2;
      packed[static_cast<size_t>(at)] = Up(r, n);
    }
  return FactorBytes(packed, bits, kUpScale);
}

float Expected(const Kind& kind, int m, int n) {
  float sum = 0.f, correction = 0.f;
  for (int k = 0; k < kK; ++k)
    sum += static_cast<float>(Activation(m, k) * Centred(kind, k, n)) * GroupScale(GroupOf(kind, k));
  for (int r = 0; r < kRank; ++r) {
    float h = 0.f;
    for (int k = 0; k < kK; ++k) h += static_cast<float>(Activation(m, k) * Down(k, r)) * kDownScale;
    correction += Value(Half(h)) * static_cast<float>(Up(r, n)) * kUpScale;
  }
  return sum + correction + static_cast<float>(n);
}

template <class V>
uint64_t Put(Device& device, const std::vector<V>& values) {
  return device.Allocate(values.size() * sizeof(V), values.data());
}

const char* RunOne(Device& device, int tokens, const Kind& kind) {
  QeProblem p{};
  p.dtype = QE_F16, p.M = tokens, p.N = kN, p.K = kK;
  p.act_bits = kind.act_bits, p.group_size = kind.group_size, p.has_zeros = kind.zeros, p.rank_shared = kRank;
  p.weight_bits = kind.bits, p.adapter_bits = kind.adapter_bits;
  std::vector<uint16_t> x(static_cast<size_t>(tokens) * kK);
  for (int m = 0; m < tokens; ++m)
    for (int k = 0; k < kK; ++k) x[static_cast<size_t>(m) * kK + k] = Half(static_cast<float>(Activation(m, k)));
  // prepack/pack.py, code_unit
  const float code = kind.act_bits == 0 ? 16777216.f : kind.bits == 3 ? 0.03125f : kind.zeros ? 0.125f : 0.0625f;
  const bool integers = kind.adapter_bits != 16;  // their scales are applied after the products
  const float up_scale = integers ? kUpScale : 1.f;
  std::vector<float> columns(3 * kN);
  for (int n = 0; n < kN; ++n) {
    columns[n] = code * (kind.group_size < 0 ? kScale : 1.f / 1048576.f) / up_scale;
    columns[kN + n] = up_scale;
    columns[2 * kN + n] = static_cast<float>(n);
  }
  QeBuffers b{};
  b.x = Put(device, x);
  b.weight = Put(device, PackWeight(kind));
  b.scales = Put(device, PackScales(kind));
  b.columns = Put(device, columns);
  b.zeros = Put(device, PackZeros(kind));
  b.down = Put(device, PackDown(kind.adapter_bits));
  b.down_scale = Put(device, std::vector<float>(kRank, integers ? kDownScale : 1.f));
  b.up = Put(device, PackUp(kind.adapter_bits));
  std::vector<uint16_t> y(static_cast<size_t>(tokens) * kN);
  b.y = device.Allocate(y.size() * 2, nullptr);
  b.workspace = device.Allocate(QeWorkspaceBytes(&p), nullptr);
  std::vector<uint32_t> counters(QeCounterBytes(&p) / sizeof(uint32_t));
  b.counters = device.Counters(counters.size() * sizeof(uint32_t));
  for (const uint64_t address : {b.x, b.weight, b.columns, b.scales, b.zeros, b.down, b.down_scale, b.up, b.y, b.workspace})
    if (!address) return kNoMemory;
  QePlan plan;
  const QeTactic tactic{0, 0, device.Multiprocessors(), device.Clusters()};
  if (const char* why = QeMakePlan(&p, &b, &tactic, &plan)) return why;
  if (const char* why = device.Run(plan)) return why;
  if (!device.Read(b.y, y.data(), y.size() * 2)) return kNotRead;
  if (b.counters && !device.Read(b.counters, counters.data(), counters.size() * sizeof(uint32_t))) return kNotRead;
  for (const uint32_t counter : counters)
    if (counter != 0) return kWrongResults;
  for (int m = 0; m < tokens; ++m)
    for (int n = 0; n < kN; ++n) {
      const float expected = Expected(kind, m, n), got = Value(y[static_cast<size_t>(m) * kN + n]);
      if (!(fabsf(got - expected) <= 0.001f * fabsf(expected) + 0.01f)) return kWrongResults;
    }
  return nullptr;
}

}  // namespace

const char* const kWrongResults =
    "The kernels compute wrong results on this GPU. Do not use this engine; run plugins/device_check.sh and report it.";

const char* SelfTest(Device& device) {
  for (const Kind& kind : kKinds)
    for (const int tokens : {1, 9, 33})  // both decode kernels and the GEMM with a tail
      if (const char* why = RunOne(device, tokens, kind)) return why;
  return nullptr;
}

}  // namespace qe
