#include "../include/qe_edge/plan.h"

#include <stdio.h>
#include <string.h>

#include <algorithm>

#include "../include/qe_edge/args.h"

namespace {

constexpr int kDecodeLimit = 16;      // tokens; above it the tiled GEMM runs
constexpr int kMaxRank = 128;
constexpr int kMaxExperts = 16;
constexpr int kMaxSplits = 16;
constexpr int64_t kMaxK = 131072;     // int32 sums of 16 * q * xq and of 8 * code * xq stay exact up to it
constexpr int64_t kMaxPieces = int64_t{1} << 32;

int RoundUp(int v, int to) { return (v + to - 1) / to * to; }
int Divide(int v, int by) { return (v + by - 1) / by; }

// The problem as the kernels count it.
struct Shape {
  int Kp, Np, shared_tiles, routed_tiles, experts;
  bool int8, decode, lowrank;

  explicit Shape(const QeProblem& p) {
    Kp = RoundUp(p.K, 128);
    Np = RoundUp(p.N, 32);
    // One expert needs no router: prepack joined its columns to the shared ones.
    const bool routed = p.num_experts > 1 && p.rank_routed > 0;
    experts = routed ? p.num_experts : 0;
    shared_tiles = Divide(p.rank_shared + (p.num_experts == 1 ? p.rank_routed : 0), 16);
    routed_tiles = routed ? Divide(p.rank_routed, 16) : 0;
    int8 = p.act_bits != 0;
    decode = p.M <= kDecodeLimit;
    lowrank = shared_tiles + routed_tiles > 0;
  }
  int rank() const { return 16 * (shared_tiles + routed_tiles); }
  int down_tiles() const { return shared_tiles + experts * routed_tiles; }
};

// Weights that are not centred on zero; with 16-bit activations all of them are.
bool Zeros(const QeProblem& p) { return p.has_zeros || p.act_bits == 0; }

// Whether a GEMM multiplies the zero points of its groups by sums of activations; else it takes them off the weights.
bool SumsOfGemm(const QeProblem& p) { return p.act_bits != 0 && p.group_size == 64 && p.has_zeros; }

// Bytes of the sums of activations that `main` takes zero points off with; prepare.cuh has their layout.
size_t SumBytes(const QeProblem& p, const Shape& s) {
  if (!Zeros(p)) return 0;
  if (p.group_size < 0) return size_t{4} * p.M;
  if (s.decode) return size_t{4} * kDecodeLimit * (s.Kp / p.group_size);
  return SumsOfGemm(p) ? static_cast<size_t>(p.M) * (s.Kp / 128) * qe::kTokenSums : 0;
}

// Slices of K in the decode down-projection: enough blocks to draw on all of the memory, each with work for its warps.
int Splits(const QeProblem& p, const Shape& s) {
  const int used_tiles = s.shared_tiles + s.routed_tiles * std::min(p.M, std::max(1, s.experts));
  return std::clamp(std::min(64 / std::max(1, used_tiles), Divide(p.K, 256)), 1, kMaxSplits);
}

struct Workspace {
  size_t act, token_scale, sums, expert, order, h, end;
};

size_t Take(size_t& at, size_t bytes) {
  const size_t here = at;
  at = (at + bytes + 255) / 256 * 256;
  return here;
}

Workspace Layout(const QeProblem& p, const Shape& s) {
  Workspace w{};
  size_t at = 0;
  const size_t m = static_cast<size_t>(p.M);
  const size_t places = !s.decode ? m : m <= 8 ? 8 : 16;  // see store_words in kernels/prepare.cuh
  w.act = Take(at, places * s.Kp * (s.int8 ? 1 : 2));
  w.token_scale = Take(at, m * 4);
  w.sums = Take(at, SumBytes(p, s));
  w.expert = Take(at, m * 4);
  w.order = Take(at, m * 4);
  w.h = Take(at, s.decode ? m * s.rank() * 4 * Splits(p, s) : m * s.rank() * 2);
  w.end = at;
  return w;
}

template <class P>
P* At(uint64_t address) {
  return reinterpret_cast<P*>(static_cast<uintptr_t>(address));
}

template <class Args>
void Fill(QeLaunch& launch, const char* name, int gx, int gy, int threads, int shared, const Args& args) {
  static_assert(sizeof(Args) <= sizeof(launch.args), "QeLaunch::args is too small");
  launch = QeLaunch{};
  snprintf(launch.kernel, sizeof launch.kernel, "%s", name);
  launch.grid_x = static_cast<uint32_t>(gx);
  launch.grid_y = static_cast<uint32_t>(gy);
  launch.threads = static_cast<uint32_t>(threads);
  launch.shared_bytes = static_cast<uint32_t>(shared);
  launch.args_bytes = sizeof(Args);
  memcpy(launch.args, &args, sizeof(Args));
}

const char* Tag(const QeProblem& p) { return p.dtype == QE_F16 ? "f16" : "bf16"; }

const char* Variant(const QeProblem& p) {
  if (p.weight_bits == 3) {
    if (p.act_bits == 0) return p.group_size < 0 ? "hw3_cz" : p.group_size == 128 ? "hw3_g128z" : "hw3_g64z";
    return p.group_size < 0 ? "s8w3_c" : p.group_size == 128 ? "s8w3_g128" : "s8w3_g64";
  }
  if (p.act_bits == 0) return p.group_size < 0 ? "h_cz" : p.group_size == 128 ? "h_g128z" : "h_g64z";
  if (p.group_size < 0) return p.has_zeros ? "s8_cz" : "s8_c";
  if (p.group_size == 128) return p.has_zeros ? "s8_g128z" : "s8_g128";
  return p.has_zeros ? "s8_g64z" : "s8_g64";
}

// Three pipeline stages; mirrors Stage in kernels/prefill_loader.cuh.
int PrefillShared(const QeProblem& p, int rows) {
  const int groups = p.group_size < 0 ? 0 : 128 / p.group_size;
  const int of_row = (p.act_bits ? 128 : 256) + (SumsOfGemm(p) ? qe::kTokenSums : 0);
  return 3 * (rows * of_row + 128 * 16 * p.weight_bits + groups * 256 + (Zeros(p) ? groups * 128 : 0));
}

// What the codes of 16-bit activations are multiplied by; a GEMM takes it off 3-bit weights that become numbers.
uint64_t CodeShifts(const QeProblem& p, const Shape& s) {
  if (p.act_bits != 0) return 0;
  if (p.weight_bits == 4) return qe::kCodeShifts4;
  return p.group_size < 0 || s.decode ? qe::kCodeShifts3 : 0;
}

void PlanPrepare(const QeProblem& p, const Shape& s, const QeBuffers& b, const Workspace& w, QeLaunch& launch) {
  qe::PrepareArgs a{};
  a.x = At<void>(b.x);
  a.inv_omega = p.has_inv_omega ? At<void>(b.inv_omega) : nullptr;
  a.router = s.experts ? At<void>(b.router) : nullptr;
  a.act = At<void>(b.workspace + w.act);
  a.token_scale = At<float>(b.workspace + w.token_scale);
  a.sums = SumBytes(p, s) ? At<void>(b.workspace + w.sums) : nullptr;
  a.expert = s.experts ? At<int32_t>(b.workspace + w.expert) : nullptr;
  a.M = p.M, a.K = p.K, a.Kp = s.Kp, a.E = s.experts;
  a.act_max = p.act_bits == 8 ? 127 : p.act_bits == 6 ? 31 : 0;
  a.decode_order = s.decode;
  a.sum_rows = p.group_size < 0 ? 0 : p.group_size;
  a.code_shifts = CodeShifts(p, s);
  // A lone token has one block to itself: more threads draw the router's weights faster.
  const int threads = p.M <= kDecodeLimit && p.K >= 4096 ? 512 : 256;
  char name[48];
  snprintf(name, sizeof name, "qe_prepare_%s", Tag(p));
  Fill(launch, name, p.M, 1, threads, (1 + threads / 32) * (kMaxExperts + 1) * 4, a);
}

void PlanDown(const QeProblem& p, const Shape& s, const QeBuffers& b, const Workspace& w, QeLaunch& launch) {
  qe::DownArgs a{};
  a.x = At<void>(b.x);
  a.down = At<void>(b.down);
  a.down_scale = At<float>(b.down_scale);
  a.expert = At<int32_t>(b.workspace + w.expert);
  a.M = p.M, a.K = p.K, a.E = s.experts;
  a.shared_tiles = s.shared_tiles, a.routed_tiles = s.routed_tiles;
  a.splits = s.decode ? Splits(p, s) : 1;
  constexpr int kWarps = 4;
  char name[48];
  if (s.decode) {
    a.partial = At<float>(b.workspace + w.h);
    const int tokens8 = p.M <= 8 ? 1 : 2;
    snprintf(name, sizeof name, "qe_down_decode_a%d_t%d_%s", p.adapter_bits, tokens8 * 8, Tag(p));
    Fill(launch, name, s.down_tiles(), a.splits, kWarps * 32, kWarps * tokens8 * 4 * 128, a);
    return;
  }
  a.h = At<void>(b.workspace + w.h);
  a.order = At<int32_t>(b.workspace + w.order);
  const int blocks = Divide(p.M, 32);
  const int shared_blocks = s.shared_tiles ? blocks : 0, routed_blocks = s.experts ? blocks + s.experts : 0;
  snprintf(name, sizeof name, "qe_down_prefill_a%d_%s", p.adapter_bits, Tag(p));
  Fill(launch, name, shared_blocks + routed_blocks, Divide(std::max(s.shared_tiles, s.routed_tiles), 2), kWarps * 32,
       32 * 4 + kWarps * 16 * 4 + kWarps * 2 * 4 * 4 * 128, a);
}

void PlanMain(const QeProblem& p, const Shape& s, const QeBuffers& b, const Workspace& w, const QeTactic& t,
              QeLaunch& launch) {
  qe::MainArgs a{};
  a.act = At<void>(b.workspace + w.act);
  a.token_scale = At<float>(b.workspace + w.token_scale);
  a.sums = At<void>(b.workspace + w.sums);
  a.weight = At<uint8_t>(b.weight);
  a.scales = At<void>(b.scales);
  a.zeros = At<uint8_t>(b.zeros);
  a.columns = At<float>(b.columns);
  a.partial = At<float>(b.workspace + w.h);
  a.h = At<void>(b.workspace + w.h);
  a.up = At<void>(b.up);
  a.expert = At<int32_t>(b.workspace + w.expert);
  a.order = s.experts && !s.decode ? At<int32_t>(b.workspace + w.order) : nullptr;
  a.y = At<void>(b.y);
  a.M = p.M, a.N = p.N, a.Np = s.Np, a.Kp = s.Kp;
  a.E = s.experts, a.shared_tiles = s.shared_tiles, a.routed_tiles = s.routed_tiles;
  a.splits = s.decode ? Splits(p, s) : 1;
  a.up_bits = p.adapter_bits;
  char name[48];
  if (s.decode) {
    const int warps = t.decode_warps ? t.decode_warps : 8, tokens8 = p.M <= 8 ? 1 : 2;
    snprintf(name, sizeof name, "qe_decode_%s_t%d_%s", Variant(p), tokens8 * 8, Tag(p));
    Fill(launch, name, Divide(p.N, 32), 1, warps * 32, warps * 2 * tokens8 * 4 * 128, a);
    return;
  }
  const int rows = t.block_rows ? t.block_rows : 64;
  snprintf(name, sizeof name, "qe_prefill_%s_%s", Variant(p), Tag(p));
  Fill(launch, name, Divide(p.N, 128), Divide(p.M, rows), rows * 2, PrefillShared(p, rows), a);
}

}  // namespace

const char* QeRefuse(const QeProblem* problem) {
  if (!problem) return "No problem was given. Pass a QeProblem.";
  const QeProblem& p = *problem;
  if (p.dtype != QE_F16 && p.dtype != QE_BF16)
    return "The activation type is neither float16 nor bfloat16. Cast x to one of them before QELinear.";
  if (p.M < 1 || p.M > (1 << 20)) return "The token count is outside 1 to 1048576. Split the batch.";
  if (p.K < 8 || p.K > kMaxK || p.K % 8)
    return "in_features is not a multiple of 8 between 8 and 131072. Keep this layer in 16 bits.";
  if (p.N < 8 || p.N > (1 << 24) || p.N % 8)
    return "out_features is not a multiple of 8 between 8 and 16777216. Keep this layer in 16 bits.";
  if (p.act_bits != 0 && p.act_bits != 6 && p.act_bits != 8)
    return "act_bits is not 0, 6 or 8. Quantize with one of these activation widths.";
  if (p.group_size != -1 && p.group_size != 64 && p.group_size != 128)
    return "group_size is not -1, 64 or 128. Quantize with one of these group sizes.";
  if (p.group_size > 0 && p.K % p.group_size)
    return "in_features is not a multiple of group_size. Quantize this layer per output channel (group_size -1).";
  if (p.rank_shared < 0 || p.rank_shared > kMaxRank || p.rank_routed < 0 || p.rank_routed > kMaxRank)
    return "A rank is outside 0 to 128. Use a smaller rank.";
  if (p.num_experts == 1 && p.rank_shared + p.rank_routed > kMaxRank)
    return "One routed expert joins the shared one and their ranks exceed 128. Use a smaller rank.";
  if (p.num_experts < 0 || p.num_experts > kMaxExperts)
    return "num_experts is outside 0 to 16. Use at most 16 routed experts.";
  if (p.num_experts == 0 && p.rank_routed != 0)
    return "rank_routed is set but num_experts is 0. Set both or neither.";
  for (const int32_t flag : {p.has_zeros, p.has_inv_omega})
    if (flag != 0 && flag != 1) return "A flag of the problem is neither 0 nor 1. Rebuild the engine from the model.";
  if (p.adapter_bits != 4 && p.adapter_bits != 8 && p.adapter_bits != 16)
    return "adapter_bits is not 4, 8 or 16. Lower the model with qe-edge build.";
  if (p.weight_bits != 3 && p.weight_bits != 4)
    return "weight_bits is neither 3 nor 4. Lower the model with qe-edge build.";
  if (p.weight_bits == 3 && (p.dtype != QE_F16 || (p.act_bits != 0 && p.has_zeros)))
    return "3-bit weights have no kernels for bfloat16 or integer activations with zero points. Pack them with 4 bits.";
  if (static_cast<int64_t>(p.M) * RoundUp(p.K, 128) / 8 >= kMaxPieces)
    return "The activations exceed what one launch can address. Split the batch.";
  return nullptr;
}

size_t QeWorkspaceBytes(const QeProblem* problem) {
  if (QeRefuse(problem)) return 0;
  return Layout(*problem, Shape(*problem)).end;
}

size_t QeCounterBytes(const QeProblem* problem) {
  if (QeRefuse(problem)) return 0;
  return size_t{4} * Shape(*problem).Np / 32;
}

const char* QeMakePlan(const QeProblem* problem, const QeBuffers* buffers, const QeTactic* tactic, QePlan* plan) {
  if (const char* why = QeRefuse(problem)) return why;
  if (!buffers || !plan) return "Buffers or plan are missing. Pass both.";
  const QeProblem& p = *problem;
  const QeTactic t = tactic ? *tactic : QeTactic{};
  if (t.decode_warps != 0 && t.decode_warps != 2 && t.decode_warps != 4 && t.decode_warps != 8)
    return "decode_warps is not 2, 4 or 8. Use a tactic from the plugin's list.";
  if (t.block_rows != 0 && t.block_rows != 64 && (t.block_rows != 128 || !p.act_bits))
    return "block_rows is not 64, or 128 with int8 activations. Use a tactic from the plugin's list.";
  const Shape s(p);
  const Workspace w = Layout(p, s);
  *plan = QePlan{};
  PlanPrepare(p, s, *buffers, w, plan->launch[plan->count++]);
  if (s.lowrank) PlanDown(p, s, *buffers, w, plan->launch[plan->count++]);
  PlanMain(p, s, *buffers, w, t, plan->launch[plan->count++]);
  return nullptr;
}
