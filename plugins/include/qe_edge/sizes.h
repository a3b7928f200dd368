// Sizes that the plan and the kernels agree on, each once.
#pragma once

#ifdef __CUDACC__
#define QE_BOTH __host__ __device__
#else
#define QE_BOTH
#endif

namespace qe {

constexpr int kChunk = 128;        // rows of K in one packed weight tile, and in one step of `main`
constexpr int kBlockColumns = 32;  // columns whose weights, scales and zero points are together
constexpr int kMaxExperts = 16;
constexpr int kMaxSplits = 16, kMaxPrefillSplits = 8;  // slices of K in a down-projection

// Decode.
constexpr int kLoneTokens = 4;    // that `main` can quantize itself
constexpr int kGroupTokens = 16;  // of one block, where it does not
constexpr int kDecodeWarps = 12;  // of a block, at most
constexpr int kRing = 3;          // chunks of weights that a warp has in flight

constexpr int kClusterWarps = 8, kCorrectWarps = 4;  // of a block of a cluster; of them, for a correction
constexpr int kClusterRing = 4;   // as kRing
constexpr int kMostCluster = 8;   // blocks, on every chip that has clusters
constexpr int kClusterTokens = 4;

// Prompts.
constexpr int kPrepareWarps = 16;                     // of a block that prepares and projects down, at most
constexpr int kDownTokens = 32, kDownColumnTiles = 4;  // of a block that projects down: tokens, and tiles of 16 columns
constexpr int kPrefillColumns = 128, kStages = 3;      // of a block of the GEMM
constexpr int kTokenSums = 16;  // bytes of one token in one chunk: sums of int8 activations for a GEMM with two groups in a chunk

// Tokens of a block that prepares and projects down, by the bits of its factors.
QE_BOTH constexpr int PrepareTokens(int factor_bits) { return factor_bits == 16 ? 16 : 8; }

// One stage of the GEMM: activations of all rows, with sums where zero points of two groups are taken off by them; weights;
// scales; zero points.
QE_BOTH constexpr int StageBytes(int rows, int weight_bits, bool int8, int groups, bool zeros) {
  const int of_row = (int8 ? kChunk : 2 * kChunk) + (int8 && groups == 2 && zeros ? kTokenSums : 0);
  return rows * of_row + kPrefillColumns * kChunk * weight_bits / 8 + groups * kPrefillColumns * (zeros ? 3 : 2);
}

// What a GEMM's correction needs in place of the stages: h of all rows, 16 bytes apart from each other so that eight of them lie
// in different banks; and the words of `up` that the block's columns have of the shared expert, by steps of 16 ranks.
QE_BOTH constexpr int OperandRowBytes(int rank_tiles) { return 32 * rank_tiles + 16; }
QE_BOTH constexpr int UpStepBytes(int factor_bits) { return kPrefillColumns * 2 * factor_bits; }

}  // namespace qe
