"""One quantized linear layer as the plugin gets it, and the choice of its kernels as in `plugins/host/shape.h`."""

from __future__ import annotations

from dataclasses import dataclass

from qe_edge.predict.shapes import Linear
from qe_edge.predict.work import Work

# From plugins/host/shape.h: tokens up to which the decode kernels run on any GPU, and where the GEMM would leave the
# GPU empty; tokens up to which `main` quantizes its input itself; tokens of one block otherwise.
DECODE_LIMIT, LONG_DECODE_LIMIT, LONE_TOKENS, GROUP_TOKENS = 16, 64, 4, 16
TILE_ROWS, TILE_COLUMNS, STEP = 64, 128, 128  # of the plugin's GEMM: tokens, outputs, and channels of a step
# its other tile: tokens, and from how many channels and rounds on it runs
WIDE_ROWS, WIDE_CHANNELS, WIDE_ROUNDS = 128, 3072, 4
DECODE_COLUMNS, DECODE_SHARED = 32, 96 << 10  # of a block: outputs that it has at once, and bytes


@dataclass(frozen=True)
class Correction:
    """The low-rank correction of a layer, as the plugin stores it.

    Attributes:
        shared: Rank of the shared expert.
        routed: Rank of each routed expert.
        experts: Number of routed experts; below 2 there is no router.
        bits: Bits of a stored value: 4, 8 or 16.

    Example:
        >>> correction = Correction(shared=32, routed=32, experts=8, bits=8)
        >>> correction.rank  # of one token: the shared expert and one routed expert
        64
        >>> correction.stored(side=1536, tokens=1) / 1024  # KiB
        96.0
    """

    shared: int
    routed: int
    experts: int
    bits: int

    @property
    def shared_tiles(self) -> int:
        """Number of tiles of 16 ranks that every token needs."""
        return divide(self.shared + (self.routed if self.experts == 1 else 0), 16)

    @property
    def routed_tiles(self) -> int:
        """Number of tiles of 16 ranks of one routed expert."""
        return divide(self.routed, 16) if self.experts > 1 else 0

    @property
    def rank(self) -> int:
        """Ranks that one token uses, in whole tiles."""
        return 16 * (self.shared_tiles + self.routed_tiles)

    def stored(self, side: int, tokens: int) -> float:
        """Bytes of one factor along `side` that `tokens` tokens read."""
        return self.bits / 8 * side * (self.shared + self.routed * min(tokens, self.experts))


@dataclass(frozen=True)
class Problem:
    """One quantized linear layer as the plugin gets it.

    Attributes:
        linear: Its widths; siblings are joined.
        tokens: Number of tokens.
        variant: The kernel for its grid, for example "s8_c".
        correction: Its low-rank correction.
        weight_bytes: Bytes of the packed codes with scales and zero points.

    Example:
        >>> problem = Problem(Linear(1536, (1536,)), 1, "s8_g128z", Correction(32, 32, 8, bits=8), 1.4e6)
        >>> problem.int8, problem.bits, problem.zeros, problem.groups, problem.decode(multiprocessors=132)
        (True, 4, True, 1, True)
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

    @property
    def bits(self) -> int:
        """Bits of a weight."""
        return 3 if "w3" in self.variant else 4

    @property
    def zeros(self) -> bool:
        """Whether the grid of the weights has zero points."""
        return self.variant.endswith("z")

    @property
    def groups(self) -> int:
        """Number of groups in one step of 128 channels; 0 with one scale per output."""
        return {"g128": 1, "g64": 2}.get(self.variant.split("_")[1].rstrip("z"), 0)

    def decode(self, multiprocessors: int) -> bool:
        """Whether the kernels for few tokens run."""
        tiles = 2 * divide(self.linear.out_features, TILE_COLUMNS)
        return self.tokens <= DECODE_LIMIT or (self.tokens <= LONG_DECODE_LIMIT and tiles <= multiprocessors)

    @property
    def prepares_at_once(self) -> bool:
        """Whether a GEMM's tokens are quantized and projected down in one launch; a router would have to run first."""
        return self.correction.routed_tiles == 0 and self.variant != "s8_g64z"

    def wide(self, multiprocessors: int) -> bool:
        """Whether the GEMM's tile has 128 tokens."""
        tiles = divide(self.linear.out_features, TILE_COLUMNS) * divide(self.tokens, WIDE_ROWS)
        per_channel = self.variant in ("s8_c", "s8_cz", "s8w3_c")
        return per_channel and self.linear.in_features >= WIDE_CHANNELS and tiles >= WIDE_ROUNDS * multiprocessors


def main_work(problem: Problem, issued: float) -> Work:
    """Return the work of the last launch: the product with the weights and the up-projection.

    Example:
        >>> problem = Problem(Linear(1536, (1536,)), 1, "s8_g128z", Correction(32, 32, 8, bits=8), 1.4e6)
        >>> work = main_work(problem, issued=0)
        >>> work.int8_macs == 1536 * 1536, work.fp16_macs == 64 * 1536
        (True, True)
    """
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


def divide(value: int, by: int) -> int:
    """Divide and round up.

    Example:
        >>> divide(10, 4)
        3
    """
    return -(-value // by)
