"""How long single kernels take: latency of a block, rounds of blocks, memory, tensor cores and issued instructions.

A kernel takes its launch, a fixed time, and then what the slowest resource needs; near a tie both count. The grids are
those of `plugins/host/plan.cpp`; a test of the plugin compares them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qe_edge.predict.shapes import Linear
from qe_edge.predict.tables import Device, InstructionTable, Timing

# Of plugins/host/shape.h: tokens up to which its decode kernels run, on any GPU and where the GEMM would leave the GPU
# empty; tokens that `main` quantizes itself; tokens of one block otherwise.
DECODE_LIMIT, LONG_DECODE_LIMIT, LONE_TOKENS, GROUP_TOKENS = 16, 64, 4, 16
TILE_ROWS, TILE_COLUMNS, STEP = 64, 128, 128  # of the plugin's GEMM: tokens, outputs, and channels of a step
# its other tile: tokens, and from how many channels and rounds on it runs
WIDE_ROWS, WIDE_CHANNELS, WIDE_ROUNDS = 128, 3072, 4
# of a block that prepares and projects down; twice the tokens with 16-bit factors
PREPARE_TOKENS, PREPARE_WARPS = 8, 16
DECODE_COLUMNS, DECODE_WARPS, DECODE_SETS, DECODE_SHARED = 32, 12, 8, 96 << 10
FIRST_OVERLAP = 90  # the compute capability, times ten, from which a launch may start before the one in front ends
LIBRARY_TILE, SMALLEST_TILE, EDGE_TILE = 128, 16, 64
BLEND = 3  # exponent with which resources of about the same time are joined


@dataclass(frozen=True)
class Work:
    """What something costs, whatever the device.

    Attributes:
        launches: Kernels.
        bytes: Read and written.
        int8_macs: Multiply-accumulates on int8 tensor cores.
        fp16_macs: The same in float16.
        instructions: Warp instructions; 0 where they were not counted.
    """

    launches: float = 0
    bytes: float = 0
    int8_macs: float = 0
    fp16_macs: float = 0
    instructions: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + its for mine, its in zip(self._values(), other._values(), strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * value for value in self._values()))

    def _values(self) -> tuple[float, ...]:
        return self.launches, self.bytes, self.int8_macs, self.fp16_macs, self.instructions


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        name: What it does.
        work: What it costs, whatever the device.
        fixed: Cycles before and after its loops.
        latency: Cycles of one block after the other on a multiprocessor, each waiting for itself.
        busy: Cycles of a multiprocessor that has as many blocks as it takes, for its share of all blocks.
        library: Whether it uses the fastest tensor instructions of the device, as a vendor's library does.
        waste: What the tensor cores multiply relative to the work.
        blocks: Size of the grid.
        overlaps: Whether it may start before the launch in front ends, on chips that can.
    """

    name: str
    work: Work = field(default_factory=lambda: Work(1))
    fixed: float = 0
    latency: float = 0
    busy: float = 0
    library: bool = False
    waste: float = 1
    blocks: int = 1
    overlaps: bool = False

    def microseconds(self, device: Device, timing: Timing) -> dict[str, float]:
        """Time that each resource needs, and what none of them explains under "launch latency"."""
        cycle = 1 / (device.clock_ghz * 1000)
        fp16_macs = device.library_fp16_macs if self.library and device.library_fp16_macs else device.fp16_macs
        int8 = self.work.int8_macs / device.per_second(device.int8_macs)
        fp16 = self.work.fp16_macs / device.per_second(fp16_macs)
        return {
            "latency": self.latency * cycle,
            "memory": self.work.bytes / (device.bandwidth_gbs * 1000 * timing.bandwidth),
            "tensor cores": 1e6 * self.waste * (int8 + fp16) / timing.tensor,
            "instruction issue": self.busy * cycle,
        }

    def total(self, device: Device, timing: Timing, launch_us: float) -> float:
        """Microseconds of the kernel with its launches."""
        needed = self.microseconds(device, timing).values()
        fixed = self.work.launches * self.fixed / (device.clock_ghz * 1000)
        joined: float = sum(value**BLEND for value in needed) ** (1 / BLEND)
        if self.overlaps and int(device.chip.removeprefix("sm_")) >= FIRST_OVERLAP:
            launch_us *= timing.overlapped_launch
        return self.work.launches * launch_us + fixed + joined


@dataclass(frozen=True)
class Correction:
    """The low-rank correction of a layer, as the plugin stores it.

    Attributes:
        shared: Rank of the shared expert.
        routed: Rank of each routed expert.
        experts: Number of routed experts; below 2 there is no router.
        bits: Of a stored value: 4, 8 or 16.
    """

    shared: int
    routed: int
    experts: int
    bits: int

    @property
    def shared_tiles(self) -> int:
        """Tiles of 16 ranks that every token needs."""
        return _divide(self.shared + (self.routed if self.experts == 1 else 0), 16)

    @property
    def routed_tiles(self) -> int:
        """Tiles of 16 ranks of one routed expert."""
        return _divide(self.routed, 16) if self.experts > 1 else 0

    @property
    def rank(self) -> int:
        """Ranks that one token uses, in whole tiles."""
        return 16 * (self.shared_tiles + self.routed_tiles)

    def stored(self, side: int, tokens: int) -> float:
        """Bytes of one factor along `side` that `tokens` tokens read."""
        return self.bits / 8 * side * (self.shared + self.routed * min(tokens, self.experts))


@dataclass(frozen=True)
class Problem:
    """One quantized linear as the plugin gets it.

    Attributes:
        linear: Its widths; siblings are joined.
        tokens: Number of tokens.
        variant: The kernel of its grid, for example "s8_c".
        correction: Its low-rank correction.
        weight_bytes: Packed codes with scales and zero points.
    """

    linear: Linear
    tokens: int
    variant: str
    correction: Correction
    weight_bytes: float

    @property
    def int8(self) -> bool:
        """Whether activations are integers."""
        return self.variant.startswith("s8")

    def decode(self, multiprocessors: int) -> bool:
        """Whether the kernels for few tokens run."""
        tiles = 2 * _divide(self.linear.out_features, TILE_COLUMNS)
        return self.tokens <= DECODE_LIMIT or (self.tokens <= LONG_DECODE_LIMIT and tiles <= multiprocessors)

    @property
    def prepares_at_once(self) -> bool:
        """Whether a GEMM's tokens are quantized and projected down in one launch: there is no router to ask first."""
        return self.correction.routed_tiles == 0 and self.variant != "s8_g64z"

    def wide(self, multiprocessors: int) -> bool:
        """Whether the GEMM's tile has 128 tokens."""
        tiles = _divide(self.linear.out_features, TILE_COLUMNS) * _divide(self.tokens, WIDE_ROWS)
        per_channel = self.variant in ("s8_c", "s8_cz", "s8w3_c")
        return per_channel and self.linear.in_features >= WIDE_CHANNELS and tiles >= WIDE_ROUNDS * multiprocessors

    @property
    def lone(self) -> bool:
        """Whether `main` quantizes its tokens itself: few of them, which fit its shared memory."""
        channels = STEP * _divide(self.linear.in_features, STEP)
        groups = {"g128": 1, "g64": 2}.get(self.variant.split("_")[1].rstrip("z"), 0) if "z" in self.variant else 0
        held = channels * self.tokens * (1 if self.int8 else 2) + channels // STEP * groups * 64
        extras = 208 + 8 * self.tokens * DECODE_WARPS + self.tokens * (2 * self.correction.rank + 64)
        warp = 1024 + 1536 * (3 if "w3" in self.variant else 4)
        return self.tokens <= LONE_TOKENS and held + extras + warp <= DECODE_SHARED


def plugin_kernels(problem: Problem, device: Device, table: InstructionTable, timing: Timing) -> list[Kernel]:
    """The launches of the plugin for one linear."""
    corrected = problem.correction.rank > 0
    if not problem.decode(device.multiprocessors):
        main = _main_prefill(problem, device, table, timing)
        if problem.prepares_at_once:
            return [_prepare_down(problem, device, timing), main]
        middle = [_down_prefill(problem, device, timing)] if corrected else []
        return [_prepare(problem, device, timing), *middle, main]
    main = _main_decode(problem, device, table, timing)
    if problem.lone:
        return [_down_decode(problem, timing), main] if corrected else [main]
    first = _prepare(problem, device, timing)
    if corrected:
        first = _side_by_side(first, _down_decode(problem, timing))
    return [first, main]


def library_kernel(linear: Linear, tokens: int, device: Device, timing: Timing) -> Kernel:
    """A float16 GEMM of cuBLAS."""
    k, n, cost = linear.in_features, linear.out_features, timing.library_gemm
    rows = min(LIBRARY_TILE, max(SMALLEST_TILE, 1 << (tokens - 1).bit_length()))
    tiles = _divide(n, LIBRARY_TILE) * _divide(tokens, rows)
    macs = float(tokens) * k * n
    work = Work(1, 2.0 * k * n + 2.0 * tokens * (k + n), fp16_macs=macs)
    # the last round of tiles takes as long as a full one
    rounds = _divide(tiles, device.multiprocessors)
    waste = rounds * device.multiprocessors * rows * LIBRARY_TILE * k / macs if rounds > 1 else 1.0
    return Kernel("gemm", work, cost.fixed, cost.per_channel * k, library=True, waste=waste, blocks=tiles)


def edge_llm_kernel(
    linear: Linear, tokens: int, group: int, device: Device, table: InstructionTable, timing: Timing
) -> Kernel:
    """A W4A16 kernel of TensorRT Edge-LLM."""
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
    tile, blocks = timing.edge_gemm, _divide(tokens, EDGE_TILE) * _divide(n, EDGE_TILE)
    latency = k * (tile.per_channel + tile.per_channel_and_block * blocks / device.multiprocessors)
    issued = macs / 1000 * table.edge_llm.prefill_per_1000_mac
    return Kernel("edge gemm", Work(1, moved, 0, macs, issued), tile.fixed, latency, blocks=blocks)


def _prepare(problem: Problem, device: Device, timing: Timing) -> Kernel:
    k, tokens, cost = problem.linear.in_features, problem.tokens, timing.prepare
    experts = problem.correction.experts if problem.correction.routed_tiles else 0
    eights, most = _divide(k, 8), 512 if problem.decode(device.multiprocessors) else 320
    threads = _divide(_divide(eights, _divide(eights, most)), 32) * 32
    factor = 1.0 if problem.int8 else cost.float_factor
    alone = k / threads * (cost.per_thread_channel * factor + cost.router_per_thread_channel * experts)
    busy = tokens * k * (cost.per_channel * factor + cost.router_per_channel * experts) / device.multiprocessors
    moved = tokens * k * (3.0 if problem.int8 else 4.0) + 2.0 * experts * k
    return Kernel(
        "prepare", Work(1, moved, fp16_macs=float(tokens) * experts * k), cost.fixed, alone, busy, blocks=tokens,
        overlaps=True,
    )  # fmt: skip


def _prepare_down(problem: Problem, device: Device, timing: Timing) -> Kernel:
    """A block has few tokens; its warps share the channels."""
    k, tokens, correction, cost = problem.linear.in_features, problem.tokens, problem.correction, timing.prepare_down
    tiles = correction.shared_tiles
    blocks = _divide(tokens, PREPARE_TOKENS * (2 if tiles and correction.bits == 16 else 1))
    warps = min(PREPARE_WARPS, max(1, _divide(_divide(k, STEP) * 4, 3)))
    channel = cost.per_warp_channel * (1.0 if problem.int8 else cost.float_factor)
    block = k / warps * (channel + cost.per_warp_channel_and_tile * tiles)
    moved = tokens * (k * (3.0 if problem.int8 else 4.0) + 2.0 * correction.rank) + correction.stored(k, 1)
    return Kernel(
        "prepare and down" if tiles else "prepare", Work(1, moved, fp16_macs=float(tokens) * correction.rank * k),
        cost.fixed, block, block * blocks / device.multiprocessors, blocks=blocks, overlaps=True,
    )  # fmt: skip


def _side_by_side(prepare: Kernel, down: Kernel) -> Kernel:
    """One launch of both: the longer one counts."""
    return Kernel(
        "prepare and down", prepare.work + down.work + Work(-1), max(prepare.fixed, down.fixed),
        max(prepare.latency, down.latency), max(prepare.busy, down.busy), blocks=prepare.blocks + down.blocks,
        overlaps=True,
    )  # fmt: skip


def _down_decode(problem: Problem, timing: Timing) -> Kernel:
    """X @ down of all experts: which of them the tokens use is known later."""
    k, tokens, correction, cost = problem.linear.in_features, problem.tokens, problem.correction, timing.down_decode
    routed = correction.experts * correction.routed_tiles
    tiles = correction.shared_tiles + routed
    splits = max(1, min(320 // tiles, _divide(k, 128), 16 if tokens <= LONE_TOKENS else 4))
    work = Work(
        1, correction.bits / 8 * k * 16 * tiles + 2.0 * tokens * k + 4.0 * tokens * 16 * tiles * splits,
        fp16_macs=16.0 * tokens * tiles * k,
    )  # fmt: skip
    latency = timing.down_integer_factor.get(correction.bits, 1.0) * k / splits * cost.per_channel
    latency += k / splits * cost.per_channel_and_token * tokens
    blocks = tiles * splits * (1 if problem.lone else _divide(tokens, GROUP_TOKENS))
    scores = splits if problem.lone and routed else 0
    return Kernel("down", work, cost.fixed, latency, blocks=blocks + scores, overlaps=True)


def _down_prefill(problem: Problem, device: Device, timing: Timing) -> Kernel:
    """X @ down of every expert that a token uses; the last block of several slices of K adds them up."""
    k, tokens, correction, tile = problem.linear.in_features, problem.tokens, problem.correction, timing.down_prefill
    shared, routed = correction.shared_tiles, correction.routed_tiles
    rows = _divide(tokens, 32)
    blocks = ((rows if shared else 0) + (rows + correction.experts if routed else 0)) * _divide(max(shared, routed), 4)
    splits = max(1, min(264 // max(1, blocks), _divide(k, 384), 8))
    work = Work(
        1, correction.stored(k, tokens) + 2.0 * tokens * (k + correction.rank),
        fp16_macs=float(tokens) * correction.rank * k,
    )  # fmt: skip
    integer = timing.down_integer_factor.get(correction.bits, 1.0)
    resident = blocks * splits / device.multiprocessors
    latency = integer * k / splits * (tile.per_channel + tile.per_channel_and_block * resident)
    return Kernel("down", work, tile.fixed, latency, blocks=blocks * splits, overlaps=True)


def _main_decode(problem: Problem, device: Device, table: InstructionTable, timing: Timing) -> Kernel:
    k, n, tokens, cost = problem.linear.in_features, problem.linear.out_features, problem.tokens, timing.main_decode
    correction, lone = problem.correction, problem.lone
    per_kib = table.decode_per_kib[device.chip][f"{problem.variant}_t{8 if lone else 16}"]
    groups = 1 if tokens <= LONE_TOKENS else _divide(tokens, GROUP_TOKENS)
    issued = k * n / 2048 * per_kib * (1 if lone else groups)
    columns, beside = _divide(n, DECODE_COLUMNS), max(1, device.multiprocessors // (1 if lone else groups))
    sets = min(DECODE_SETS, _divide(columns, beside))
    chunks = _divide(k, STEP)
    warps = min(max(1, DECODE_WARPS // sets), chunks)
    blocks = min(columns, beside)
    rounds = _divide(columns, blocks * sets)
    # what a block does in every round of columns, and once: its tokens
    read = 0.75 if "w3" in problem.variant else 1.0  # of the bytes of 4-bit weights
    step = cost.step * read + cost.step_per_instruction * per_kib
    block = rounds * (cost.block + _divide(chunks, warps) * step)
    threads = 32 * warps * sets
    if lone:
        block += tokens * (cost.quantize + cost.quantize_per_thread_channel * k / threads)
    if correction.rank:
        block += cost.correction + rounds * cost.per_rank * correction.rank * min(tokens, GROUP_TOKENS) ** 0.5
        if correction.routed_tiles:
            block += (cost.per_routed_token + (cost.choose if lone else 0)) * min(tokens, GROUP_TOKENS)
    busy = issued / cost.instructions_per_cycle / device.multiprocessors
    return Kernel(
        "main", _main_work(problem, issued), cost.fixed, block, busy, blocks=blocks * (1 if lone else groups),
        overlaps=True,
    )  # fmt: skip


def _main_prefill(problem: Problem, device: Device, table: InstructionTable, timing: Timing) -> Kernel:
    k, n, tokens, cost = problem.linear.in_features, problem.linear.out_features, problem.tokens, timing.main_prefill
    wide = problem.wide(device.multiprocessors)
    rows = WIDE_ROWS if wide else TILE_ROWS
    per_mac = table.prefill_per_1000_mac[device.chip][f"wide_{problem.variant}" if wide else problem.variant] / 1000
    blocks = _divide(n, TILE_COLUMNS) * _divide(tokens, rows)
    # a block of twice the rows has twice of all but what the issue of its instructions takes
    share = rows / TILE_ROWS
    step = share * cost.step + per_mac * rows * TILE_COLUMNS * STEP / cost.instructions_per_cycle
    block = k / STEP * step + share * (cost.block + cost.per_rank * problem.correction.rank)
    issued = float(tokens) * k * n * per_mac
    return Kernel(
        "main", _main_work(problem, issued), cost.fixed, block * cost.alone, block * blocks / device.multiprocessors,
        blocks=blocks,
    )  # fmt: skip


def _main_work(problem: Problem, issued: float) -> Work:
    k, n, tokens, correction = (
        problem.linear.in_features,
        problem.linear.out_features,
        problem.tokens,
        problem.correction,
    )
    macs, low_rank = float(tokens) * k * n, float(tokens) * correction.rank * n
    codes = tokens * k * (1.0 if problem.int8 else 2.0)
    moved = problem.weight_bytes + correction.stored(n, tokens) + codes + 2.0 * tokens * (n + correction.rank)
    if problem.int8:
        return Work(1, moved, macs, low_rank, issued)
    return Work(1, moved, 0, macs + low_rank, issued)


def _divide(value: int, by: int) -> int:
    return -(-value // by)
