"""Times of single kernels from the latency and the rounds of blocks, memory, tensor cores and issued instructions.

The time of a kernel is its launch, a fixed time, and the time of the slowest resource; near a tie both count. The grids
equal those of `plugins/host/plan.cpp`; a test of the plugin compares them.
"""

from __future__ import annotations

from qe_edge.predict.clusters import cluster_kernel, cut_clusters
from qe_edge.predict.decode import DecodeCut, cut_decode
from qe_edge.predict.problem import (
    DECODE_COLUMNS,
    GROUP_TOKENS,
    LONE_TOKENS,
    STEP,
    TILE_COLUMNS,
    TILE_ROWS,
    WIDE_ROWS,
    Problem,
    divide,
    main_work,
)
from qe_edge.predict.shapes import Linear
from qe_edge.predict.tables import Device, InstructionTable
from qe_edge.predict.timing import Timing
from qe_edge.predict.work import Kernel, Work

# tokens and warps of a block that prepares and projects down; twice the tokens with 16-bit factors
PREPARE_TOKENS, PREPARE_WARPS = 8, 16
LIBRARY_TILE, SMALLEST_TILE, EDGE_TILE = 128, 16, 64


def plugin_kernels(problem: Problem, device: Device, table: InstructionTable, timing: Timing) -> list[Kernel]:
    """Return the launches of the plugin for one linear layer.

    Example:
        >>> from qe_edge.predict.problem import Correction
        >>> from qe_edge.predict.tables import get_device, instruction_table, timing_table
        >>> correction, tables = Correction(32, 32, 8, bits=8), (instruction_table(), timing_table())
        >>> one, many = (Problem(Linear(1536, (1536,)), tokens, "s8_g128z", correction, 1.4e6) for tokens in (1, 1024))
        >>> [kernel.name for kernel in plugin_kernels(one, get_device("h100"), *tables)]
        ['cluster']
        >>> [kernel.name for kernel in plugin_kernels(many, get_device("h100"), *tables)]
        ['prepare', 'down', 'main']
    """
    corrected = problem.correction.rank > 0
    if not problem.decode(device.multiprocessors):
        main = _main_prefill(problem, device, table, timing)
        if problem.prepares_at_once:
            return [_prepare_down(problem, device, timing), main]
        middle = [_down_prefill(problem, device, timing)] if corrected else []
        return [_prepare(problem, device, timing), *middle, main]
    if device.from_sm_90 and device.clusters and (clusters := cut_clusters(problem, device.multiprocessors)):
        return [cluster_kernel(problem, clusters, device, table, timing)]
    cut = cut_decode(problem, device.multiprocessors)
    main = _main_decode(problem, cut, device, table, timing)
    if cut.lone:
        return [_down_decode(problem, timing, lone=True), main] if corrected else [main]
    first = _prepare(problem, device, timing)
    if corrected:
        first = _side_by_side(first, _down_decode(problem, timing, lone=False))
    return [first, main]


def library_kernel(linear: Linear, tokens: int, device: Device, timing: Timing) -> Kernel:
    """A float16 GEMM of cuBLAS.

    Example:
        >>> from qe_edge.predict.tables import get_device, timing_table
        >>> kernel = library_kernel(Linear(1536, (1536,)), 1024, get_device("h100"), timing_table())
        >>> kernel.blocks, kernel.work.fp16_macs == 1024 * 1536 * 1536
        (96, True)
    """
    k, n, cost = linear.in_features, linear.out_features, timing.library_gemm
    rows = min(LIBRARY_TILE, max(SMALLEST_TILE, 1 << (tokens - 1).bit_length()))
    tiles = divide(n, LIBRARY_TILE) * divide(tokens, rows)
    macs = float(tokens) * k * n
    work = Work(1, 2.0 * k * n + 2.0 * tokens * (k + n), fp16_macs=macs)
    # the last round of tiles takes as long as a full one
    rounds = divide(tiles, device.multiprocessors)
    waste = rounds * device.multiprocessors * rows * LIBRARY_TILE * k / macs if rounds > 1 else 1.0
    return Kernel("gemm", work, cost.fixed, cost.per_channel * k, library=True, waste=waste, blocks=tiles)


def edge_llm_kernel(
    linear: Linear, tokens: int, group: int, device: Device, table: InstructionTable, timing: Timing
) -> Kernel:
    """A W4A16 kernel of TensorRT Edge-LLM.

    Example:
        >>> from qe_edge.predict.tables import get_device, instruction_table, timing_table
        >>> tables = instruction_table(), timing_table()
        >>> kernel = edge_llm_kernel(Linear(1536, (1536,)), 1, 128, get_device("h100"), *tables)
        >>> kernel.name, f"{kernel.work.bytes / 1536**2:.2f} bytes a weight"
        ('edge decode', '0.52 bytes a weight')
    """
    k, n = linear.in_features, linear.out_features
    moved = k * n / 2 + 2.0 * k * n / group + 2.0 * tokens * (k + n)
    macs = float(tokens) * k * n
    per_kib = table.edge_llm.decode(tokens)
    if per_kib is not None:
        cost = timing.edge_decode
        issued = per_kib * k * n / 2048
        stalls = 1 + cost.per_further_token * (tokens - 1)
        busy = issued * stalls / cost.instructions_per_cycle / device.multiprocessors
        return Kernel(
            "edge decode", Work(1, moved, 0, macs, issued), cost.fixed, cost.per_1024_channels * k / 1024, busy
        )
    tile, blocks = timing.edge_gemm, divide(tokens, EDGE_TILE) * divide(n, EDGE_TILE)
    latency = k * (tile.per_channel + tile.per_channel_and_block * blocks / device.multiprocessors)
    issued = macs / 1000 * table.edge_llm.prefill_per_1000_mac
    return Kernel("edge gemm", Work(1, moved, 0, macs, issued), tile.fixed, latency, blocks=blocks)


def _prepare(problem: Problem, device: Device, timing: Timing) -> Kernel:
    k, tokens, cost = problem.linear.in_features, problem.tokens, timing.prepare
    experts = problem.correction.experts if problem.correction.routed_tiles else 0
    eights, most = divide(k, 8), 512 if problem.decode(device.multiprocessors) else 320
    threads = divide(divide(eights, divide(eights, most)), 32) * 32
    factor = 1.0 if problem.int8 else cost.float_factor
    alone = k / threads * (cost.per_thread_channel * factor + cost.router_per_thread_channel * experts)
    busy = tokens * k * (cost.per_channel * factor + cost.router_per_channel * experts) / device.multiprocessors
    moved = tokens * k * (3.0 if problem.int8 else 4.0) + 2.0 * experts * k
    return Kernel(
        "prepare", Work(1, moved, fp16_macs=float(tokens) * experts * k), cost.fixed, alone, busy, blocks=tokens,
        overlaps=True,
    )  # fmt: skip


def _prepare_down(problem: Problem, device: Device, timing: Timing) -> Kernel:
    """The launch that quantizes tokens and projects them down. A block has few tokens; its warps share the channels."""
    k, tokens, correction, cost = problem.linear.in_features, problem.tokens, problem.correction, timing.prepare_down
    tiles = correction.shared_tiles
    blocks = divide(tokens, PREPARE_TOKENS * (2 if tiles and correction.bits == 16 else 1))
    warps = min(PREPARE_WARPS, max(1, divide(divide(k, STEP) * 4, 3)))
    channel = cost.per_warp_channel * (1.0 if problem.int8 else cost.float_factor)
    block = k / warps * (channel + cost.per_warp_channel_and_tile * tiles)
    moved = tokens * (k * (3.0 if problem.int8 else 4.0) + 2.0 * correction.rank) + correction.stored(k, 1)
    return Kernel(
        "prepare and down" if tiles else "prepare", Work(1, moved, fp16_macs=float(tokens) * correction.rank * k),
        cost.fixed, block, block * blocks / device.multiprocessors, blocks=blocks, overlaps=True,
    )  # fmt: skip


def _side_by_side(prepare: Kernel, down: Kernel) -> Kernel:
    """One launch that does both side by side: the longer one counts."""
    return Kernel(
        "prepare and down", prepare.work + down.work + Work(-1), max(prepare.fixed, down.fixed),
        max(prepare.latency, down.latency), max(prepare.busy, down.busy), blocks=prepare.blocks + down.blocks,
        overlaps=True,
    )  # fmt: skip


def _down_decode(problem: Problem, timing: Timing, *, lone: bool) -> Kernel:
    """X @ down of all experts, because the tokens' experts are not known yet."""
    k, tokens, correction, cost = problem.linear.in_features, problem.tokens, problem.correction, timing.down_decode
    routed = correction.experts * correction.routed_tiles
    tiles = correction.shared_tiles + routed
    splits = max(1, min(320 // tiles, divide(k, 128), 16 if tokens <= LONE_TOKENS else 4))
    work = Work(
        1, correction.bits / 8 * k * 16 * tiles + 2.0 * tokens * k + 4.0 * tokens * 16 * tiles * splits,
        fp16_macs=16.0 * tokens * tiles * k,
    )  # fmt: skip
    latency = timing.down_integer_factor.get(correction.bits, 1.0) * k / splits * cost.per_channel
    scores = splits if lone and routed else 0
    if scores:
        latency += cost.scores * tokens
    blocks = tiles * splits * (1 if lone else divide(tokens, GROUP_TOKENS))
    return Kernel("down", work, cost.fixed, latency, blocks=blocks + scores, overlaps=True)


def _down_prefill(problem: Problem, device: Device, timing: Timing) -> Kernel:
    """X @ down of every expert that a token uses; the last block of several slices of K adds them up."""
    k, tokens, correction, tile = problem.linear.in_features, problem.tokens, problem.correction, timing.down_prefill
    shared, routed = correction.shared_tiles, correction.routed_tiles
    rows = divide(tokens, 32)
    blocks = ((rows if shared else 0) + (rows + correction.experts if routed else 0)) * divide(max(shared, routed), 4)
    splits = max(1, min(264 // max(1, blocks), divide(k, 384), 8))
    work = Work(
        1, correction.stored(k, tokens) + 2.0 * tokens * (k + correction.rank),
        fp16_macs=float(tokens) * correction.rank * k,
    )  # fmt: skip
    integer = timing.down_integer_factor.get(correction.bits, 1.0)
    resident = blocks * splits / device.multiprocessors
    latency = integer * k / splits * (tile.per_channel + tile.per_channel_and_block * resident)
    return Kernel("down", work, tile.fixed, latency, blocks=blocks * splits, overlaps=True)


def _main_decode(problem: Problem, cut: DecodeCut, device: Device, table: InstructionTable, timing: Timing) -> Kernel:
    k, n, tokens, cost = problem.linear.in_features, problem.linear.out_features, problem.tokens, timing.main_decode
    correction = problem.correction
    per_kib = table.decode_per_kib[device.chip][f"{problem.variant}_t{8 if cut.lone else 16}"]
    issued = k * n / 2048 * per_kib * cut.groups
    rounds = divide(divide(n, DECODE_COLUMNS), cut.blocks * cut.sets)
    # what a block does in every round of columns, and once: its tokens
    step = cost.step * problem.bits / 4 + cost.step_per_instruction * per_kib
    block = rounds * (cost.block + divide(cut.steps, cut.warps) * step)
    if cut.lone:
        channels = min(k, cut.steps * STEP) / (32 * cut.warps * cut.sets)
        factor = 1.0 if problem.int8 else cost.float_factor
        block += tokens * (cost.quantize + cost.quantize_per_thread_channel * channels * factor)
    if correction.rank:
        block += cost.correction + rounds * cost.per_rank * correction.rank * min(tokens, GROUP_TOKENS) ** 0.5
        if correction.routed_tiles:
            block += (cost.per_routed_token + (cost.choose if cut.lone else 0)) * min(tokens, GROUP_TOKENS)
    if cut.slices > 1:
        block *= divide(cut.blocks * cut.slices, device.multiprocessors)
    busy = issued / cost.instructions_per_cycle / device.multiprocessors
    return Kernel(
        "main", main_work(problem, issued), cost.fixed, block, busy, blocks=cut.blocks * cut.slices * cut.groups,
        overlaps=True,
    )  # fmt: skip


def _main_prefill(problem: Problem, device: Device, table: InstructionTable, timing: Timing) -> Kernel:
    k, n, tokens, cost = problem.linear.in_features, problem.linear.out_features, problem.tokens, timing.main_prefill
    wide = problem.wide(device.multiprocessors)
    rows = WIDE_ROWS if wide else TILE_ROWS
    per_mac = table.prefill_per_1000_mac[device.chip][f"wide_{problem.variant}" if wide else problem.variant] / 1000
    blocks = divide(n, TILE_COLUMNS) * divide(tokens, rows)
    # a block of twice the rows has twice of all but what the issue of its instructions takes
    share = rows / TILE_ROWS
    step = share * cost.step + per_mac * rows * TILE_COLUMNS * STEP / cost.instructions_per_cycle
    block = k / STEP * step + share * (cost.block + cost.per_rank * problem.correction.rank)
    issued = float(tokens) * k * n * per_mac
    return Kernel(
        "main", main_work(problem, issued), cost.fixed, block * cost.alone, block * blocks / device.multiprocessors,
        blocks=blocks,
    )  # fmt: skip
