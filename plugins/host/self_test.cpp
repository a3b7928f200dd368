#include "self_test.h"

#include <math.h>

#include <vector>

namespace qe {
namespace {

constexpr int kK = 256, kN = 32, kRank = 16;  // two chunks of K, one column block, one rank tile
constexpr char kWrong[] =
    "The kernels compute wrong results on this GPU. Do not use this engine; run plugins/device_check.sh and report it.";
constexpr char kNoMemory[] = "The self-test found no GPU memory. Free some and try again.";

// Small integers and powers of two, so that every float16 value below is exact and only y is rounded.
int Weight(int k, int n) { return (k * 7 + n * 5 + k / 16) % 16 - 8; }
int Activation(int m, int k) { return k == 3 ? 127 : (m * 31 + k * 11) % 201 - 100; }  // the maximum makes the scale 1
float Down(int k, int r) { return k % kRank == r ? 0.25f : 0.f; }
float Up(int r, int n) { return (r + n) % 3 == 0 ? 0.5f : -0.25f; }
constexpr float kScale = 0.015625f;

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
std::vector<uint8_t> PackWeight(bool sixteen_bit) {
  std::vector<uint8_t> packed(kK * kN / 2, 0);
  for (int k = 0; k < kK; ++k)
    for (int n = 0; n < kN; ++n) {
      const int row = k % 128;
      int word, nibble, pair;
      if (sixteen_bit) {
        word = row / 32, pair = row % 8 / 2;
        nibble = (row % 32 / 16) * 2 + (row % 16 / 8) + (row % 2) * 4;
      } else {
        word = row % 64 / 16, pair = row % 16 / 4;
        nibble = row % 4 * 2 + row / 64;
      }
      const int lane = n % 8 * 4 + pair, value = (sixteen_bit ? Weight(k, n) + 8 : Weight(k, n)) & 15;
      packed[((k / 128 * (kN / 8) + n / 8) * 32 + lane) * 16 + word * 4 + nibble / 2] |=
          static_cast<uint8_t>(value << (nibble % 2 * 4));
    }
  return packed;
}

std::vector<uint16_t> PackDown() {
  std::vector<uint16_t> packed(kK * kRank);
  for (int k = 0; k < kK; ++k)
    for (int r = 0; r < kRank; ++r) {
      const int pair = k % 32 / 8, step = k % 8 / 4, lane = r % 8 * 4 + pair, reg = k % 4 / 2 * 2 + r / 8;
      packed[((k / 32 * 2 + step) * 32 + lane) * 8 + reg * 2 + k % 2] = Half(Down(k, r));
    }
  return packed;
}

std::vector<uint16_t> PackUp() {
  std::vector<uint16_t> packed(kRank * kN);
  for (int r = 0; r < kRank; ++r)
    for (int n = 0; n < kN; ++n) {
      const int lane = n % 8 * 4 + r % 8 / 2;
      packed[(n / 8 * 32 + lane) * 4 + r / 8 * 2 + r % 2] = Half(Up(r, n));
    }
  return packed;
}

float Expected(int m, int n) {
  float sum = 0.f, correction = 0.f;
  for (int k = 0; k < kK; ++k) sum += static_cast<float>(Activation(m, k) * Weight(k, n));
  for (int r = 0; r < kRank; ++r) {
    float h = 0.f;
    for (int k = 0; k < kK; ++k) h += static_cast<float>(Activation(m, k)) * Down(k, r);
    correction += Value(Half(h)) * Up(r, n);
  }
  return sum * kScale + correction + static_cast<float>(n);
}

template <class V>
uint64_t Put(Device& device, const std::vector<V>& values) {
  return device.Allocate(values.size() * sizeof(V), values.data());
}

const char* RunOne(Device& device, int tokens, int act_bits) {
  QeProblem p{};
  p.dtype = QE_F16, p.M = tokens, p.N = kN, p.K = kK;
  p.act_bits = act_bits, p.group_size = -1, p.rank_shared = kRank;
  std::vector<uint16_t> x(static_cast<size_t>(tokens) * kK);
  for (int m = 0; m < tokens; ++m)
    for (int k = 0; k < kK; ++k) x[static_cast<size_t>(m) * kK + k] = Half(static_cast<float>(Activation(m, k)));
  std::vector<float> columns(3 * kN);
  for (int n = 0; n < kN; ++n) {
    columns[n] = kScale / (act_bits ? 16.f : 1.f);
    columns[kN + n] = 1.f;
    columns[2 * kN + n] = static_cast<float>(n);
  }
  QeBuffers b{};
  b.x = Put(device, x);
  b.weight = Put(device, PackWeight(act_bits == 0));
  b.columns = Put(device, columns);
  b.zeros = Put(device, std::vector<uint8_t>(kN, 8));
  b.down = Put(device, PackDown());
  b.down_scale = Put(device, std::vector<float>(kRank, 1.f));
  b.up = Put(device, PackUp());
  std::vector<uint16_t> y(static_cast<size_t>(tokens) * kN);
  b.y = device.Allocate(y.size() * 2, nullptr);
  b.workspace = device.Allocate(QeWorkspaceBytes(&p), nullptr);
  for (const uint64_t address : {b.x, b.weight, b.columns, b.zeros, b.down, b.down_scale, b.up, b.y, b.workspace})
    if (!address) return kNoMemory;
  QePlan plan;
  if (const char* why = QeMakePlan(&p, &b, nullptr, &plan)) return why;
  if (const char* why = device.Run(plan)) return why;
  if (!device.Read(b.y, y.data(), y.size() * 2)) return kWrong;
  for (int m = 0; m < tokens; ++m)
    for (int n = 0; n < kN; ++n) {
      const float expected = Expected(m, n), got = Value(y[static_cast<size_t>(m) * kN + n]);
      if (!(fabsf(got - expected) <= 0.001f * fabsf(expected) + 0.01f)) return kWrong;
    }
  return nullptr;
}

}  // namespace

const char* SelfTest(Device& device) {
  for (const int act_bits : {8, 0})
    for (const int tokens : {1, 9, 33})  // both decode kernels and the GEMM with a tail
      if (const char* why = RunOne(device, tokens, act_bits)) return why;
  return nullptr;
}

}  // namespace qe
