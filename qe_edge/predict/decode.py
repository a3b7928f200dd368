"""The cut of a decode launch of `main`. `CutDecode` in `plugins/host/shape.h` makes the same cut and explains it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from qe_edge.predict.problem import DECODE_COLUMNS, DECODE_SHARED, GROUP_TOKENS, LONE_TOKENS, STEP, Problem, divide

# From shape.h: warps of a block, sets of 32 columns that it holds at once, slices, and the least steps of a slice.
DECODE_WARPS, DECODE_SETS, MOST_SLICES, SLICE_STEPS = 12, 8, 8, 256


@dataclass(frozen=True)
class DecodeCut:
    """A cut of one linear into blocks.

    Attributes:
        lone: Whether `main` quantizes its tokens itself, which it does for few tokens that fit its shared memory.
        slices: Slices of the channels; each goes to other blocks.
        steps: Steps of 128 channels in a slice.
        sets: Sets of 32 outputs that a block holds at once.
        warps: Warps that share a slice of a set.
        blocks: Blocks of the launch for one slice and one group of tokens.
        groups: Groups of tokens; each goes to other blocks.
    """

    lone: bool
    slices: int
    steps: int
    sets: int
    warps: int
    blocks: int
    groups: int


@lru_cache(maxsize=4096)
def cut_decode(problem: Problem, multiprocessors: int) -> DecodeCut:
    """Return the cut that the plan chooses for few tokens.

    Example:
        >>> from qe_edge.predict.problem import Correction
        >>> from qe_edge.predict.shapes import Linear
        >>> problem = Problem(Linear(1536, (8960, 8960)), 1, "s8_g128z", Correction(32, 32, 8, bits=8), 14e6)
        >>> cut_decode(problem, multiprocessors=84)
        DecodeCut(lone=True, slices=1, steps=12, sets=7, warps=1, blocks=84, groups=1)
    """
    tokens, columns = problem.tokens, divide(problem.linear.out_features, DECODE_COLUMNS)
    steps, groups = (
        divide(problem.linear.in_features, STEP),
        1 if tokens <= LONE_TOKENS else divide(tokens, GROUP_TOKENS),
    )
    wanted = max(1, min(divide(multiprocessors, columns * groups), steps // SLICE_STEPS, MOST_SLICES))
    wanted = divide(steps, divide(steps, wanted))
    for slices in range(wanted, MOST_SLICES + 1 if tokens <= LONE_TOKENS else 0):
        cut = _cut_columns(problem, slices, multiprocessors, groups, lone=True)
        if _shared_bytes(problem, cut) <= DECODE_SHARED:
            return cut
    return _cut_columns(problem, wanted, multiprocessors, groups, lone=False)


def _cut_columns(problem: Problem, slices: int, multiprocessors: int, groups: int, *, lone: bool) -> DecodeCut:
    columns, steps = divide(problem.linear.out_features, DECODE_COLUMNS), divide(problem.linear.in_features, STEP)
    of_slice = divide(steps, slices)
    slices = divide(steps, of_slice)
    beside = max(1, multiprocessors // groups)
    sets = 1 if slices > 1 else min(DECODE_SETS, divide(columns, beside))
    warps = min(max(1, DECODE_WARPS // sets), of_slice)
    blocks = columns if slices > 1 else min(columns, beside)
    cut = DecodeCut(lone, slices, of_slice, sets, warps, blocks, groups)
    while _shared_bytes(problem, cut) > DECODE_SHARED and cut.warps > 1:
        cut = replace(cut, warps=cut.warps - 1)
    while _shared_bytes(problem, cut) > DECODE_SHARED and cut.sets > 1:
        cut = replace(cut, sets=cut.sets - 1)
    return cut


def _shared_bytes(problem: Problem, cut: DecodeCut) -> int:
    """Shared memory of a block in bytes, as `PlaceShared` in shape.h."""
    tokens, warps, sums = problem.tokens, cut.sets * cut.warps, problem.groups * 64 if problem.zeros else 0
    sizes = (
        cut.steps * tokens * STEP * (1 if problem.int8 else 2) if cut.lone else 0,
        cut.steps * sums if cut.lone else 0,
        warps * 1536 * problem.bits,
        warps * (1024 if cut.lone else 2048),
        208 + (8 * tokens * DECODE_WARPS if cut.lone else 0),
        tokens * 64 if cut.lone and problem.correction.routed_tiles else 0,
        (tokens if cut.lone else min(tokens, GROUP_TOKENS)) * problem.correction.rank * 2,
    )
    return sum(16 * divide(size, 16) for size in sizes)
