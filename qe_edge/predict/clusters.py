"""The cluster launch, which decodes 1 to 4 tokens on GPUs from compute capability 9.0 on: its cut and its time.

A cluster of blocks computes some sets of 32 outputs. Each of its blocks reads a slice of the channels. `CutCluster` in
`plugins/host/shape.h` makes the same cut and explains it; a test of the plugin compares the grids.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from qe_edge.predict.problem import DECODE_COLUMNS, DECODE_SHARED, STEP, Problem, divide, main_work
from qe_edge.predict.tables import Device, InstructionTable
from qe_edge.predict.timing import Timing
from qe_edge.predict.work import Kernel, Work, join

# From plugins/include/qe_edge/sizes.h: blocks of a cluster, tokens, warps of a block and of its correction, steps of
# weights that a warp has in flight, experts. From shape.h: values of x up to which every block finds all maxima.
MOST_CLUSTER, CLUSTER_TOKENS, WARPS, CORRECT_WARPS, RING, MAX_EXPERTS, OWN_MAXIMA = 8, 4, 8, 4, 4, 16, 2048
MOST_MULTIPROCESSORS, MOST_TASKS, PIECE = 192, 4096, 256


@dataclass(frozen=True)
class ClusterCut:
    """A cut of one linear into clusters.

    Attributes:
        blocks: Blocks of a cluster, which is also the number of slices of the channels.
        clusters: Clusters of the launch.
        sets: Sets of 32 outputs in the largest cluster.
        steps: Steps of 128 channels in a slice.
        parts: Parts of a slice; each goes to another warp.
        copies: Whether integer factors of the shared expert are copied to shared memory.

    Example:
        >>> ClusterCut(blocks=4, clusters=33, sets=6, steps=3).owned  # 6 sets of outputs, shared by 4 blocks
        2
    """

    blocks: int
    clusters: int
    sets: int
    steps: int
    parts: int = 1
    copies: bool = False

    @property
    def owned(self) -> int:
        """Number of sets that one block adds up and stores."""
        return divide(self.sets, self.blocks)


@lru_cache(maxsize=4096)
def cut_clusters(problem: Problem, multiprocessors: int) -> ClusterCut | None:
    """Return the cut that the plan chooses, or None where it plans other kernels.

    Example:
        >>> from qe_edge.predict.problem import Correction
        >>> from qe_edge.predict.shapes import Linear
        >>> problem = Problem(Linear(1536, (1536,)), 1, "s8_g128z", Correction(32, 32, 8, bits=8), 1.4e6)
        >>> cut_clusters(problem, multiprocessors=132)
        ClusterCut(blocks=4, clusters=33, sets=2, steps=3, parts=1, copies=True)
    """
    if problem.tokens > CLUSTER_TOKENS:
        return None
    columns, steps = divide(problem.linear.out_features, DECODE_COLUMNS), divide(problem.linear.in_features, STEP)
    found: list[ClusterCut] = []
    for blocks in (2, 4, MOST_CLUSTER):
        of_slice = divide(steps, blocks)
        clusters = min(min(multiprocessors, MOST_MULTIPROCESSORS) // blocks, columns)
        if divide(steps, of_slice) != blocks or clusters < 1:
            continue
        integer = problem.correction.shared_tiles > 0 and problem.correction.bits < 16
        for copies in (False, True) if integer else (False,):
            for parts in range(1, min(WARPS, of_slice) + 1):
                cut = ClusterCut(blocks, clusters, divide(columns, clusters), of_slice, parts, copies)
                if _shared_bytes(problem, cut) > DECODE_SHARED or cut.sets * parts > MOST_TASKS:
                    break
                found.append(cut)
    return min(found, key=lambda cut: _planned_nanoseconds(problem, cut), default=None)


def cluster_kernel(
    problem: Problem, cut: ClusterCut, device: Device, table: InstructionTable, timing: Timing
) -> Kernel:
    """Return the launch. Its time: the weights and beside them the correction, then the sums over slices.

    Example:
        >>> from qe_edge.predict.problem import Correction
        >>> from qe_edge.predict.shapes import Linear
        >>> from qe_edge.predict.tables import get_device, instruction_table, timing_table
        >>> problem = Problem(Linear(1536, (1536,)), 1, "s8_g128z", Correction(32, 32, 8, bits=8), 1.4e6)
        >>> device, cut = get_device("h100"), ClusterCut(blocks=4, clusters=33, sets=2, steps=3)
        >>> kernel = cluster_kernel(problem, cut, device, instruction_table(), timing_table())
        >>> kernel.name, kernel.blocks, kernel.work.launches
        ('cluster', 132, 1)
    """
    cost, correction, tokens = timing.cluster, problem.correction, problem.tokens
    k, n, warps = problem.linear.in_features, problem.linear.out_features, _main_warps(problem)
    per_kib = table.decode_per_kib[device.chip][f"{problem.variant}_cluster"]
    quantize = cost.per_token * tokens + cost.quantize * divide(cut.steps * tokens, warps)
    quantize *= 1.0 if problem.int8 else cost.float_factor
    rounds = divide(cut.sets * cut.parts, warps) * divide(cut.steps, cut.parts)
    multiply = rounds * (cost.step * problem.bits / 4 + cost.step_per_instruction * per_kib)
    correct = 0.0
    if correction.rank:
        correct = cost.correction + _passes(cut, correction.shared_tiles) * timing.cluster_per_rows[correction.bits]
        correct += cost.per_set * cut.owned * correction.shared_tiles
    if correction.routed_tiles:
        expert = cost.per_expert + cost.per_expert_rows * _passes(cut, correction.routed_tiles)
        correct += cost.choose + tokens * expert
    sums = cost.per_sum * divide(cut.owned * tokens, WARPS) * cut.blocks * cut.parts
    issued = k * n / 2048 * per_kib
    read = correction.stored(k, tokens) + 2.0 * k * (correction.experts if correction.routed_tiles else 0)
    work = main_work(problem, issued) + Work(0, read, fp16_macs=float(tokens) * correction.rank * k)
    busy = issued / cost.instructions_per_cycle / device.multiprocessors
    return Kernel(
        "cluster", work, cost.fixed, join(quantize + multiply, correct) + sums, busy,
        blocks=cut.blocks * cut.clusters, overlaps=True,
    )  # fmt: skip


def _main_warps(problem: Problem) -> int:
    return WARPS - (CORRECT_WARPS if problem.correction.rank else 0)


def _parts(tiles: int) -> int:
    """Number of parts of a slice that different warps multiply by `tiles` tiles of 16 ranks."""
    return max(1, CORRECT_WARPS // tiles) if tiles else 0


def _passes(cut: ClusterCut, tiles: int) -> int:
    """Number of products of 32 channels and 16 ranks that a warp of the correction computes in sequence."""
    return divide(tiles * _parts(tiles), CORRECT_WARPS) * divide(4 * cut.steps, _parts(tiles)) if tiles else 0


def _pieces(problem: Problem, cut: ClusterCut) -> tuple[bool, int]:
    """Return whether every block finds all maxima, and of how many pieces of 256 channels it finds them."""
    k = problem.linear.in_features
    own = problem.tokens * k <= OWN_MAXIMA
    return own, divide(k if own else cut.steps * STEP, PIECE)


def _shared_bytes(problem: Problem, cut: ClusterCut) -> int:
    """Shared memory of a block in bytes, as `PlaceClusterShared` in shape.h."""
    correction, four = problem.correction, 4 * problem.tokens
    shared, routed = correction.shared_tiles, correction.routed_tiles
    experts = correction.experts if routed else 0
    own, pieces = _pieces(problem, cut)
    row = 256 * cut.steps + 64
    sizes = (
        cut.steps * problem.tokens * STEP * (1 if problem.int8 else 2),
        cut.steps * problem.groups * 64 if problem.zeros else 0,
        _main_warps(problem) * RING * 512 * problem.bits,
        pieces * (1 if own else cut.blocks) * four,
        cut.blocks * cut.steps * four if problem.zeros and not problem.groups else 0,
        cut.blocks * _parts(shared) * 16 * shared * four,
        cut.blocks * (min(CORRECT_WARPS, divide(cut.steps, 2)) if experts else 0) * MAX_EXPERTS * four,
        cut.blocks * _parts(routed) * 16 * routed * four,
        cut.owned * cut.blocks * cut.parts * DECODE_COLUMNS * four,
        four,
        MAX_EXPERTS * four if experts else 0,
        four if experts else 0,
        problem.tokens * row if correction.rank else 0,
        experts * row,
        shared * cut.steps * 4 * correction.bits * 64 if cut.copies else 0,
        cut.owned * DECODE_COLUMNS * four if correction.rank else 0,
        problem.tokens * correction.rank * 2,
        32,
    )
    return sum(16 * divide(size, 16) for size in sizes)


def _planned_nanoseconds(problem: Problem, cut: ClusterCut) -> int:
    """Time by which the plan compares cuts, as `ClusterTime` in shape.h."""
    correction, tokens, warps = problem.correction, problem.tokens, _main_warps(problem)
    units = max(0, cut.sets * cut.steps - warps * RING)
    rounds = divide(cut.sets * cut.parts, warps) * divide(cut.steps, cut.parts)
    own, pieces = _pieces(problem, cut)
    before = divide(pieces * tokens, warps) * 150 + (0 if own else 350) + divide(cut.steps * tokens, warps) * 200
    correct = 0
    if correction.rank:
        correct = 1300 + _passes(cut, correction.shared_tiles) * (40 if cut.copies else 100)
    if correction.routed_tiles:
        correct += tokens * (_passes(cut, correction.routed_tiles) * 150 + 300) + 1500
    sums = divide(cut.owned * tokens, WARPS) * cut.blocks * cut.parts * 8
    main = before + max(units * 22 * problem.bits, rounds * 200)
    return max(main, correct) + sums + 50 * (cut.blocks.bit_length() - 1)
