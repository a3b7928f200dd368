"""The rank of a low-rank correction on a small layer."""

from __future__ import annotations

FULL_SIZE = 1152  # side of a square layer from which the paper's ranks hold at most half of its parameters
RANK_STEP = 8  # kernels work on ranks in steps of this


def scale_rank(rank: int, side: int) -> int:
    """A rank (or a number of channels) for a layer whose smaller side is `side`.

    Unchanged from 1152 upwards; below, proportional to the side, rounded down to a multiple of 8 and at least 8.

    Example:
        >>> scale_rank(32, side=4096), scale_rank(32, side=576), scale_rank(32, side=64)
        (32, 16, 8)
    """
    if not rank or side >= FULL_SIZE:
        return rank
    return max(RANK_STEP, rank * side // FULL_SIZE // RANK_STEP * RANK_STEP)
