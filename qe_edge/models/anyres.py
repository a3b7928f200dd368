"""Pictures of any resolution as LLaVA takes them: an overview and tiles; which patches become which tokens.

Li et al. 2024, "LLaVA-OneVision", section 3.2. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np

from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from transformers import image_processing_utils
else:
    image_processing_utils = lazy_module("transformers.image_processing_utils")

NEIGHBOURS = 4  # patches that a token is mixed from where a picture is scaled down
LARGER = 1.1  # a picture that is less above the limit than this, per side, is not scaled down


@dataclass(frozen=True)
class Tokens:
    """The patches that the tokens of pictures are mixed from.

    Attributes:
        places: int64 `[tokens, taps]`: numbers of patches, tile after tile; `taps` is 1 or 4.
        weights: float32 `[tokens, taps]`; their sum is 1, and 0 for the token that ends a line.
    """

    places: np.ndarray
    weights: np.ndarray


def tokens_of_tile(side: int) -> Tokens:
    """Tokens of a picture that is one tile of `side` x `side` patches, and the end of a line.

    Example:
        >>> tokens_of_tile(2).places.ravel().tolist()
        [0, 1, 2, 3, 0]
    """
    places = np.append(np.arange(side**2), 0)[:, None]
    weights = np.append(np.ones(side**2, np.float32), np.float32(0))[:, None]
    return Tokens(places, weights)


def tokens_of_frame(side: int) -> Tokens:
    """Tokens of a frame of a video: its `side` x `side` patches, scaled down to half as many lines and columns.

    Example:
        >>> tokens = tokens_of_frame(3)  # four, each mixed from four patches around it
        >>> tokens.places[0].tolist(), tokens.weights[0].tolist()
        ([0, 1, 3, 4], [0.5625, 0.1875, 0.1875, 0.0625])
    """
    half = -(-side // 2)
    places, weights = _scaled_down(np.arange(side**2).reshape(side, side), half, half)
    return Tokens(places.reshape(-1, NEIGHBOURS), weights.reshape(-1, NEIGHBOURS))


def tokens_of_picture(
    size: tuple[int, int], resolutions: Sequence[tuple[int, int]], tile: int, side: int, most: int
) -> Tokens:
    """Tokens of a picture in tiles: the overview, then line by line the tiles without their padding.

    Args:
        size: Height and width of the picture in pixels.
        resolutions: Heights and widths that a picture may be scaled to, multiples of `tile`.
        tile: Pixels per side of a tile.
        side: Patches per side of a tile.
        most: A picture of more patches than this number of tiles has is scaled down.

    Example:
        >>> tokens = tokens_of_picture((56, 112), [(56, 112), (112, 112)], tile=56, side=4, most=9)
        >>> len(tokens.places)  # 16 of the overview, then 4 lines of 8 patches and a line end
        52
    """
    height, width = image_processing_utils.select_best_resolution(size, list(resolutions))
    rows, columns = height // tile, width // tile
    numbers = np.arange(rows * columns * side**2).reshape(rows, columns, side, side) + side**2  # the overview is first
    grid = _without_padding(numbers.transpose(0, 2, 1, 3).reshape(rows * side, columns * side), size)
    ratio = sqrt(grid.size / (most * side**2))
    if ratio > LARGER:
        places, weights = _scaled_down(grid, int(grid.shape[0] // ratio), int(grid.shape[1] // ratio))
    else:
        places, weights = grid[..., None], np.ones((*grid.shape, 1), np.float32)
    line_end = ((0, 0), (0, 1), (0, 0))  # a place of no weight
    places, weights = (np.pad(part, line_end).reshape(-1, part.shape[-1]) for part in (places, weights))
    overview = Tokens(np.arange(side**2)[:, None], np.ones((side**2, 1), np.float32))
    return joined([overview, Tokens(places, weights)], (0, 0))


def joined(parts: Sequence[Tokens], first: Sequence[int]) -> Tokens:
    """Join tokens, one part after the other.

    Args:
        parts: The tokens; parts may have different numbers of taps.
        first: For each part the number that is added to the numbers of its patches.

    Example:
        >>> both = joined([tokens_of_tile(1), tokens_of_tile(1)], first=[0, 1])
        >>> both.places.ravel().tolist(), both.weights.ravel().tolist()
        ([0, 0, 1, 1], [1.0, 0.0, 1.0, 0.0])
    """
    taps = max(part.places.shape[1] for part in parts)
    wide = [widened(part, taps) for part in parts]
    return Tokens(
        np.concatenate([part.places + start for part, start in zip(wide, first, strict=True)]),
        np.concatenate([part.weights for part in wide]),
    )


def widened(tokens: Tokens, taps: int) -> Tokens:
    """The same tokens with more taps, those of no weight.

    Example:
        >>> widened(tokens_of_tile(1), 2).weights.tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """
    more = ((0, 0), (0, taps - tokens.places.shape[1]))
    return Tokens(np.pad(tokens.places, more), np.pad(tokens.weights, more))


def _without_padding(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The rows or columns of patches `[rows, columns]` that hold something of a picture of `size`, as transformers."""
    (rows, columns), (height, width) = grid.shape, size
    if width / height > columns / rows:
        margin = (rows - int(round(height * (columns / width), 7))) // 2
        return grid[margin : rows - margin]
    margin = (columns - int(round(width * (rows / height), 7))) // 2
    return grid[:, margin : columns - margin]


def _scaled_down(grid: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Patches around every one of `rows` x `columns` points, and their weights: `[rows, columns, 4]`, bilinear."""
    (above, row_weights), (left, column_weights) = _between(grid.shape[0], rows), _between(grid.shape[1], columns)
    places = grid[above[:, None, :, None], left[None, :, None, :]]
    weights = row_weights[:, None, :, None] * column_weights[None, :, None, :]
    shape = (rows, columns, NEIGHBOURS)
    return places.reshape(shape), weights.reshape(shape)


def _between(size: int, points: int) -> tuple[np.ndarray, np.ndarray]:
    """For `points` points over `size` patches the two neighbours and their weights float32, both `[points, 2]`.

    As torch's bilinear interpolation without aligned corners, which computes in float32, product and sum in one step.
    """
    scale = np.float64(np.float32(size) / np.float32(points))
    place = np.maximum(((np.arange(points) + 0.5) * scale - 0.5).astype(np.float32), 0)
    below = np.floor(place).astype(np.int64)
    share = place - below.astype(np.float32)
    return np.stack([below, np.minimum(below + 1, size - 1)], 1), np.stack([np.float32(1) - share, share], 1)
