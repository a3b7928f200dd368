"""One quantized linear as the plugin gets it, and which of its kernels run: as `plugins/host/shape.h` decides."""

from __future__ import annotations

from dataclasses import dataclass

from qe_edge.predict.shapes import Linear
from qe_edge.predict.work import Work

# Of plugins/host/shape.h: tokens up to which its decode kernels run, on any GPU and where the GEMM would leave the GPU
# empty; tokens that `main` quantizes itself; tokens of one block otherwise.
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
        bits: Of a stored value: 4, 8 or 16.
    """

    shared: int
    routed: int
    experts: int
    bits: int

    @property
    def shared_tiles(self) -> int:
        """Tiles of 16 ranks that every token needs."""
        return divide(self.shared + (self.routed if self.experts == 1 else 0), 16)

    @property
    def routed_tiles(self) -> int:
        """Tiles of 16 ranks of one routed expert."""
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

    @property
    def bits(self) -> int:
        """Bits of a weight."""
        return 3 if "w3" in self.variant else 4

    @property
    def zeros(self) -> bool:
        """Whether weights are not centred on zero."""
        return self.variant.endswith("z")

    @property
    def groups(self) -> int:
        """Groups of one step of 128 channels; 0 with one scale per output."""
        return {"g128": 1, "g64": 2}.get(self.variant.split("_")[1].rstrip("z"), 0)

    def decode(self, multiprocessors: int) -> bool:
        """Whether the kernels for few tokens run."""
        tiles = 2 * divide(self.linear.out_features, TILE_COLUMNS)
        return self.tokens <= DECODE_LIMIT or (self.tokens <= LONG_DECODE_LIMIT and tiles <= multiprocessors)

    @property
    def prepares_at_once(self) -> bool:
        """Whether a GEMM's tokens are quantized and projected down in one launch: there is no router to ask first."""
        return self.correction.routed_tiles == 0 and self.variant != "s8_g64z"

    def wide(self, multiprocessors: int) -> bool:
        """Whether the GEMM's tile has 128 tokens."""
        tiles = divide(self.linear.out_features, TILE_COLUMNS) * divide(self.tokens, WIDE_ROWS)
        per_channel = self.variant in ("s8_c", "s8_cz", "s8w3_c")
        return per_channel and self.linear.in_features >= WIDE_CHANNELS and tiles >= WIDE_ROUNDS * multiprocessors


def main_work(problem: Problem, issued: float) -> Work:
    """What the product and what comes after it read, write and multiply."""
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
    """Quotient, rounded up."""
    return -(-value // by)
