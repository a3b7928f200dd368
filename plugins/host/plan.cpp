#include "../include/qe_edge/plan.h"

#include <stdio.h>
#include <string.h>

#include <algorithm>

#include "shape.h"

using namespace qe;

namespace {

struct Workspace {
  size_t act, token_scale, sums, expert, order, h, partial, scores, slices, counters, end;
};

size_t Take(size_t& at, size_t bytes) {
  const size_t here = at;
  at = (at + bytes + 255) / 256 * 256;
  return here;
}

Workspace Layout(const QeProblem& p, const Shape& s) {
  Workspace w{};
  size_t at = 0;
  const size_t m = static_cast<size_t>(p.M), splits = static_cast<size_t>(Splits(p, s));
  const size_t places = s.decode ? static_cast<size_t>(RoundUp(p.M, kGroupTokens)) : m;  // see store_words in kernels/prepare.cuh
  w.act = Take(at, places * s.Kp * (s.int8 ? 1 : 2));
  w.token_scale = Take(at, m * 4);
  w.sums = Take(at, SumBytes(p, s));
  w.expert = Take(at, m * 4);
  w.order = Take(at, m * 4);
  if (s.decode) {
    w.partial = Take(at, m * 16 * s.down_tiles() * 4 * splits);
    w.scores = Take(at, s.experts && p.M <= kLoneTokens ? m * kMaxExperts * 4 * splits : 0);
    w.slices = Take(at, m * s.Np * 4 * static_cast<size_t>(MostSlices(p, s)));
  } else {
    w.h = Take(at, m * s.rank() * 2);
    w.partial = Take(at, splits > 1 ? m * s.rank() * 4 * splits : 0);
    w.counters = Take(at, static_cast<size_t>(s.down_blocks(p.M)) * s.down_strips() * 4);
  }
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
  launch.cluster = 1;
  launch.overlaps = 1;  // all kernels wait for what runs before them (wait_for_previous)
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

int PrefillShared(const QeProblem& p, int rows) {
  return kStages * StageBytes(rows, p.weight_bits, p.act_bits != 0, p.group_size < 0 ? 0 : kChunk / p.group_size, Zeros(p));
}

// Whether a GEMM has kernels with a warp tile of 64 x 64; their block has 128 rows.
bool HasWide(const QeProblem& p) { return p.act_bits != 0 && p.group_size < 0; }

// Rows of a GEMM's block where no tactic says it. An H100 took less time with 128 where a long K met several waves of blocks.
int DefaultRows(const QeProblem& p, int multiprocessors) {
  return HasWide(p) && p.K >= 3072 && Divide(p.N, 128) * Divide(p.M, 128) >= 4 * multiprocessors ? 128 : 64;
}

// What a GEMM's correction needs instead, after the loop.
int OperandsShared(const QeProblem& p, const Shape& s, int rows) {
  return s.lowrank ? rows * OperandRowBytes(s.shared_tiles + s.routed_tiles) + s.shared_tiles * UpStepBytes(p.adapter_bits) : 0;
}

int ActMax(const QeProblem& p) { return p.act_bits == 8 ? 127 : p.act_bits == 6 ? 31 : 0; }

// What the codes of 16-bit activations are multiplied by; a GEMM takes it off 3-bit weights that become numbers.
uint64_t CodeShifts(const QeProblem& p, const Shape& s) {
  if (p.act_bits != 0) return 0;
  if (p.weight_bits == 4) return qe::kCodeShifts4;
  return p.group_size < 0 || s.decode ? qe::kCodeShifts3 : 0;
}

qe::PrepareArgs PrepareArgsOf(const QeProblem& p, const Shape& s, const QeBuffers& b, const Workspace& w) {
  qe::PrepareArgs a{};
  a.x = At<void>(b.x);
  a.inv_omega = p.has_inv_omega ? At<void>(b.inv_omega) : nullptr;
  a.router = s.experts ? At<void>(b.router) : nullptr;
  a.act = At<void>(b.workspace + w.act);
  a.token_scale = At<float>(b.workspace + w.token_scale);
  a.sums = SumBytes(p, s) ? At<void>(b.workspace + w.sums) : nullptr;
  a.expert = s.experts ? At<int32_t>(b.workspace + w.expert) : nullptr;
  a.counters = At<uint32_t>(b.workspace + w.counters);
  a.M = p.M, a.K = p.K, a.Kp = s.Kp, a.E = s.experts;
  a.act_max = ActMax(p);
  a.decode_order = s.decode;
  a.sum_rows = p.group_size < 0 ? 0 : p.group_size;
  a.counter_count = s.decode ? 0 : s.down_blocks(p.M) * s.down_strips();
  a.code_shifts = CodeShifts(p, s);
  return a;
}

qe::DownArgs DownArgsOf(const QeProblem& p, const Shape& s, const QeBuffers& b, const Workspace& w) {
  qe::DownArgs a{};
  a.x = At<void>(b.x);
  a.down = At<void>(b.down);
  a.down_scale = At<float>(b.down_scale);
  a.partial = At<float>(b.workspace + w.partial);
  a.M = p.M, a.K = p.K, a.E = s.experts;
  a.shared_tiles = s.shared_tiles, a.routed_tiles = s.routed_tiles;
  a.splits = Splits(p, s);
  return a;
}

// Threads that prepare a token: where few tokens leave the GPU empty, more threads are done sooner.
int PrepareThreads(const QeProblem& p, const Shape& s) {
  const int eights = Divide(p.K, 8), most = s.decode ? 512 : 320;
  return RoundUp(Divide(eights, Divide(eights, most)), 32);  // all threads have as many
}
int PrepareShared(int threads) { return (1 + threads / 32) * (kMaxExperts + 1) * 4; }

// What `main` of the decode needs first: h and scores where it quantizes x itself, else the tokens too.
void PlanFirst(const QeProblem& p, const Shape& s, const QeBuffers& b, const Workspace& w, bool lone, QePlan& plan) {
  if (lone && !s.lowrank) return;
  QeLaunch& launch = plan.launch[plan.count++];
  char name[48];
  qe::DownArgs down = DownArgsOf(p, s, b, w);
  if (lone) {
    down.router = s.experts ? At<void>(b.router) : nullptr;
    down.scores = At<float>(b.workspace + w.scores);
    down.next = At<void>(b.weight);
    down.next_bytes = std::min<int64_t>(int64_t{s.Np} * s.Kp * p.weight_bits / 8, 12 << 20);
    snprintf(name, sizeof name, "qe_down_decode_a%d_%s", p.adapter_bits, Tag(p));
    // As many warps as have four blocks of 32 rows each, which they hold in registers.
    const int warps = std::clamp(Divide(Divide(Divide(p.K, 32), down.splits), 4), 1, 8);
    Fill(launch, name, s.down_tiles() + (s.experts ? 1 : 0), down.splits, warps * 32, warps * 4 * 128, down);
    return;
  }
  const int threads = PrepareThreads(p, s);
  const qe::PrepareArgs prepare = PrepareArgsOf(p, s, b, w);
  if (!s.lowrank) {
    snprintf(name, sizeof name, "qe_prepare_%s", Tag(p));
    Fill(launch, name, p.M, 1, threads, PrepareShared(threads), prepare);
    return;
  }
  snprintf(name, sizeof name, "qe_prepare_down_a%d_%s", p.adapter_bits, Tag(p));
  const int blocks = s.down_tiles() * Divide(p.M, kGroupTokens) * down.splits;
  Fill(launch, name, p.M + blocks, 1, threads, std::max(PrepareShared(threads), threads / 32 * 2 * 4 * 128),
       qe::PrepareDownArgs{prepare, down});
}

// Whether `prepare` and `down` of a GEMM are one launch: no router has to be asked first, and no group has sums.
bool PreparesAtOnce(const QeProblem& p, const Shape& s) { return !s.experts && !SumsOfGemm(p); }

// Both in one launch. See prepare_prefill.cuh for what is in shared memory.
void PlanPrepareAtOnce(const QeProblem& p, const Shape& s, const QeBuffers& b, const Workspace& w, QePlan& plan) {
  qe::PrepareDownArgs a{PrepareArgsOf(p, s, b, w), DownArgsOf(p, s, b, w)};
  a.down.h = At<void>(b.workspace + w.h);
  char name[48];
  if (s.lowrank) {
    snprintf(name, sizeof name, "qe_prepare_prefill_a%d_%s", p.adapter_bits, Tag(p));
  } else {
    snprintf(name, sizeof name, "qe_prepare_prefill_%s", Tag(p));
  }
  const int tokens = PrepareTokens(s.lowrank ? p.adapter_bits : 0);
  const int sums = s.lowrank ? kDownColumnTiles * tokens / 8 * 4 * 128 : 0;  // of a warp
  const int warps = std::clamp(Divide(s.Kp / 32, 3), 1, kPrepareWarps);
  Fill(plan.launch[plan.count++], name, Divide(p.M, tokens), 1, warps * 32, 2 * kPrepareWarps * tokens * 4 + warps * sums, a);
}

void PlanPrefillFirst(const QeProblem& p, const Shape& s, const QeBuffers& b, const Workspace& w, QePlan& plan) {
  if (PreparesAtOnce(p, s)) return PlanPrepareAtOnce(p, s, b, w, plan);
  char name[48];
  const int threads = PrepareThreads(p, s);
  snprintf(name, sizeof name, "qe_prepare_%s", Tag(p));
  Fill(plan.launch[plan.count++], name, p.M, 1, threads, PrepareShared(threads), PrepareArgsOf(p, s, b, w));
  if (!s.lowrank) return;
  qe::DownArgs a = DownArgsOf(p, s, b, w);
  a.expert = At<int32_t>(b.workspace + w.expert);
  a.h = At<void>(b.workspace + w.h);
  a.order = At<int32_t>(b.workspace + w.order);
  a.counters = At<uint32_t>(b.workspace + w.counters);
  constexpr int kWarps = 8;
  snprintf(name, sizeof name, "qe_down_prefill_a%d_%s", p.adapter_bits, Tag(p));
  Fill(plan.launch[plan.count++], name, s.down_blocks(p.M), s.down_strips() * a.splits, kWarps * 32,
       32 * 4 + kWarps * 16 * 4 + 16 + kWarps * 4 * 4 * 4 * 128, a);
}

void PlanMain(const QeProblem& p, const Shape& s, const QeBuffers& b, const Workspace& w, const QeTactic& t,
              int multiprocessors, const Cut& cut, QeLaunch& launch) {
  qe::MainArgs a{};
  a.act = At<void>(b.workspace + w.act);
  a.token_scale = At<float>(b.workspace + w.token_scale);
  a.sums = At<void>(b.workspace + w.sums);
  a.weight = At<uint8_t>(b.weight);
  a.scales = At<void>(b.scales);
  a.zeros = At<uint8_t>(b.zeros);
  a.columns = At<float>(b.columns);
  a.partial = At<float>(b.workspace + w.partial);
  a.h = At<void>(b.workspace + w.h);
  a.up = At<void>(b.up);
  a.expert = At<int32_t>(b.workspace + w.expert);
  a.order = s.experts && !s.decode ? At<int32_t>(b.workspace + w.order) : nullptr;
  a.y = At<void>(b.y);
  a.M = p.M, a.N = p.N, a.Np = s.Np, a.Kp = s.Kp;
  a.E = s.experts, a.shared_tiles = s.shared_tiles, a.routed_tiles = s.routed_tiles;
  a.splits = Splits(p, s);
  a.up_bits = p.adapter_bits;
  a.x = At<void>(b.x);
  a.inv_omega = p.has_inv_omega ? At<void>(b.inv_omega) : nullptr;
  a.scores = At<float>(b.workspace + w.scores);
  a.slices = At<float>(b.workspace + w.slices);
  a.counters = At<uint32_t>(b.counters);
  a.code_shifts = CodeShifts(p, s);
  a.K = p.K, a.act_max = ActMax(p), a.k_splits = cut.slices;
  a.chunks = s.Kp / 128, a.slice_chunks = cut.slice_chunks, a.warp_chunks = cut.warp_chunks;
  a.sets = cut.sets, a.set_warps = cut.set_warps, a.token_groups = cut.groups;
  if (s.decode) a.set_factor = Divide(256, cut.set_warps);
  a.group_sums_at = cut.group_sums_at, a.ring_at = cut.ring_at, a.results_at = cut.results_at;
  a.tokens_at = cut.tokens_at, a.scores_at = cut.scores_at, a.h_at = cut.h_at;
  char name[48];
  if (s.decode) {
    snprintf(name, sizeof name, "qe_decode_%s_t%d_%s", Variant(p), cut.lone ? 8 : 16, Tag(p));
    Fill(launch, name, cut.blocks, cut.slices * cut.groups, cut.sets * cut.set_warps * 32, cut.shared, a);
    return;
  }
  int rows = t.block_rows ? t.block_rows : DefaultRows(p, multiprocessors);
  if (OperandsShared(p, s, rows) > kSharedBytes) rows = 64;
  const bool wide = rows == 128 && HasWide(p);
  snprintf(name, sizeof name, wide ? "qe_prefill_wide_%s_%s" : "qe_prefill_%s_%s", Variant(p), Tag(p));
  Fill(launch, name, Divide(p.N, 128), Divide(p.M, rows), wide ? rows : rows * 2,
       std::max(PrefillShared(p, rows), OperandsShared(p, s, rows)), a);
  launch.overlaps = 0;  // its blocks would gather on the multiprocessors that are free first
}

// All of 1 to 4 tokens in one launch of clusters.
void PlanCluster(const QeProblem& p, const Shape& s, const QeBuffers& b, const ClusterCut& c, QeLaunch& launch) {
  qe::ClusterArgs a{};
  a.x = At<void>(b.x);
  a.inv_omega = p.has_inv_omega ? At<void>(b.inv_omega) : nullptr;
  a.router = s.experts ? At<void>(b.router) : nullptr;
  a.down = At<void>(b.down);
  a.down_scale = At<float>(b.down_scale);
  a.weight = At<uint8_t>(b.weight);
  a.scales = At<void>(b.scales);
  a.zeros = At<uint8_t>(b.zeros);
  a.columns = At<float>(b.columns);
  a.up = At<void>(b.up);
  a.y = At<void>(b.y);
  a.code_shifts = CodeShifts(p, s);
  a.M = p.M, a.N = p.N, a.Np = s.Np, a.K = p.K;
  a.E = s.experts, a.shared_tiles = s.shared_tiles, a.routed_tiles = s.routed_tiles;
  a.factor_bits = p.adapter_bits, a.act_max = ActMax(p);
  a.main_warps = c.main_warps, a.own_maxima = c.own_maxima, a.pieces = c.pieces;
  a.copies_down = c.copies_down, a.score_warps = c.score_warps, a.tile_parts = c.tile_parts, a.routed_parts = c.routed_parts;
  a.cluster_blocks = c.blocks, a.cluster_shift = c.shift, a.cluster_sets = c.sets, a.longer_clusters = c.longer;
  a.chunks = s.Kp / 128, a.slice_chunks = c.slice_chunks, a.parts = c.parts, a.part_chunks = c.part_chunks;
  a.parts_factor = Divide(1 << 16, c.parts), a.token_factor = Divide(1 << 16, p.M);
  a.group_sums_at = c.group_sums_at, a.ring_at = c.ring_at, a.largest_at = c.largest_at, a.slice_sum_at = c.slice_sum_at;
  a.part_at = c.part_at, a.score_part_at = c.score_part_at, a.routed_part_at = c.routed_part_at, a.results_at = c.results_at;
  a.unit_at = c.unit_at, a.scores_at = c.scores_at, a.expert_at = c.expert_at, a.low_at = c.low_at, a.h_at = c.h_at;
  a.x_at = c.x_at, a.router_at = c.router_at, a.down_at = c.down_at, a.boxes_at = c.boxes_at, a.row_bytes = c.row_bytes;
  char name[48];
  snprintf(name, sizeof name, "qe_cluster_%s_%s", Variant(p), Tag(p));
  Fill(launch, name, c.clusters * c.blocks, 1, kClusterWarps * 32, c.shared, a);
  launch.cluster = static_cast<uint32_t>(c.blocks);
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
  // Whether a short prompt is decoded depends on the GPU.
  return std::max(Layout(*problem, Shape(*problem, 0)).end, Layout(*problem, Shape(*problem, kMostMultiprocessors)).end);
}

size_t QeCounterBytes(const QeProblem* problem) {
  if (QeRefuse(problem)) return 0;
  const Shape s(*problem, kMostMultiprocessors);
  return s.decode ? size_t{4} * s.token_groups() * (s.Np / 32) : 0;
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
  if (t.clusters != 0 && t.clusters != 1 && t.clusters != 2 && t.clusters != 4 && t.clusters != 8)
    return "clusters is not 0, 1, 2, 4 or 8. Use a tactic from the plugin's list.";
  const int multiprocessors = t.multiprocessors > 0 ? std::min(t.multiprocessors, kMostMultiprocessors) : kUnknownMultiprocessors;
  const Shape s(p, multiprocessors);
  const Workspace w = Layout(p, s);
  *plan = QePlan{};
  const ClusterCut cluster = t.clusters ? CutCluster(p, s, t, multiprocessors) : ClusterCut{};
  if (cluster.blocks) {
    PlanCluster(p, s, *buffers, cluster, plan->launch[plan->count++]);
    return nullptr;
  }
  const Cut cut = s.decode ? CutDecode(p, s, t, multiprocessors, buffers->counters != 0) : Cut{};
  if (s.decode) {
    PlanFirst(p, s, *buffers, w, cut.lone, *plan);
  } else {
    PlanPrefillFirst(p, s, *buffers, w, *plan);
  }
  PlanMain(p, s, *buffers, w, t, multiprocessors, cut, plan->launch[plan->count++]);
  return nullptr;
}
