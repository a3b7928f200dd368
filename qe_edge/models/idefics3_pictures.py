"""`preprocess.onnx` of Idefics3 and SmolVLM: a picture is scaled twice, cut into tiles, and an overview follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from qe_edge.models.graph_nodes import Nodes, Operand
from qe_edge.models.picture_graphs import PictureGraph, counted, finished, picture_input
from qe_edge.models.pillow_resize import FILTERS, resize
from qe_edge.models.tile_pictures import cut, pixel_values, repeated

NONE = -1  # where a row of a table of tokens has ended
TileIds = Callable[[int, int], list[int]]


def picture_graph(image_processor: Any, tile_ids: TileIds, image_token: int, count: int) -> PictureGraph | None:  # noqa: ANN401
    """The graph; None if the image processor or the tokenizer does what it cannot.

    Args:
        image_processor: An `Idefics3ImageProcessorPil` or `SmolVLMImageProcessorPil`.
        tile_ids: Tokens of a picture of so many rows and columns of tiles, 0 where it is not cut.
        image_token: The token of a feature, and the one that stands for a picture.
        count: Features of a tile.

    Example:
        >>> from qe_edge.models.image_processors import pil_image_processor
        >>> def tile_ids(rows: int, columns: int) -> list[int]:
        ...     places = [(row, column) for row in range(rows) for column in range(columns)]
        ...     return [token for row, column in places for token in (100 + 10 * row + column, 9)] + [8, 9, 7]
        >>> list(picture_graph(pil_image_processor("idefics3")(), tile_ids, image_token=9, count=1).outputs)
        ['pixel_values', 'placeholder_ids', 'placeholder_positions']
    """
    side, longest = image_processor.max_image_size["longest_edge"], image_processor.size["longest_edge"]
    most = -(-(longest + 1) // side)  # a side may be one pixel longer, to be even
    names = _Names.read(tile_ids, image_token, count, most if image_processor.do_image_splitting else 0)
    if not image_processor.do_resize or image_processor.resample not in FILTERS or names is None:
        return None
    write, image = Nodes(), picture_input()
    resample, tile = image_processor.resample, (side, side)
    pixels = resize(write, image, *_longest(write, image, longest), resample)
    if image_processor.do_image_splitting:
        height, width = _whole_tiles(write, pixels, side)
        pixels = resize(write, pixels, height, width, resample)
        rows, columns = write("Div", height, side), write("Div", width, side)
        both = [cut(write, pixels, rows, columns, tile), cut(write, resize(write, pixels, *tile, resample), 1, 1, tile)]
        whole = write("Equal", write("Mul", rows, columns), 1)  # it is its own overview
        start, end = write("Where", whole, 1, 0), write("Add", write("Mul", rows, columns), 1)
        tiles = write("Slice", write("Concat", *both, axis=0), write.joined(start), write.joined(end))
        rows, columns = (write("Where", whole, 0, size) for size in (rows, columns))
    else:
        rows = columns = write.constant(0)
        tiles = cut(write, resize(write, pixels, *tile, resample), 1, 1, tile)
    ids = names.nodes(write, rows, columns)
    feeds = pixel_values(write, tiles, image_processor, tile)
    return finished(write, image, feeds, counted(write, ids), image_token)


def _longest(write: Nodes, image: ir.Value, longest: int) -> tuple[ir.Value, ir.Value]:
    """Height and width whose longer one is `longest`; the other one is rounded down and made even."""
    height, width = write.size(image, 0), write.size(image, 1)
    ratio, wide = _ratio(write, height, width)
    down = write("Where", wide, write("Div", float(longest), ratio), write("Mul", float(longest), ratio))
    whole = write.cast(down, ir.DataType.INT64)
    other = write("Max", write("Add", whole, write("Mod", whole, 2)), 1)
    return write("Where", wide, other, longest), write("Where", wide, longest, other)


def _whole_tiles(write: Nodes, image: ir.Value, side: int) -> tuple[ir.Value, ir.Value]:
    """Height and width in multiples of `side`: the longer one is rounded up, the other follows it and is rounded up."""
    height, width = write.size(image, 0), write.size(image, 1)
    ratio, wide = _ratio(write, height, width)
    longer = _multiple(write, write("Where", wide, width, height), side)
    real = write.cast(longer, ir.DataType.DOUBLE)
    other = write("Where", wide, write("Div", real, ratio), write("Mul", real, ratio))
    other = _multiple(write, write.cast(other, ir.DataType.INT64), side)
    return write("Where", wide, other, longer), write("Where", wide, longer, other)


def _ratio(write: Nodes, height: ir.Value, width: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Width over height in float64, and whether the width is not the smaller one."""
    real = [write.cast(size, ir.DataType.DOUBLE) for size in (width, height)]
    return write("Div", *real), write("GreaterOrEqual", width, height)


def _multiple(write: Nodes, size: ir.Value, side: int) -> ir.Value:
    return write("Mul", write("Div", write("Add", size, side - 1), side), side)


class _Names:
    """What stands before, between and after the features of a picture's tiles.

    Attributes:
        tiles: `[rows, columns, tokens]`, the tokens before each tile's features, filled up with `NONE`.
        overview: `[2, tokens]`, the tokens before the overview's features of a picture that is not cut, and of one
            that is.
        after: The tokens after the overview's features.
    """

    def __init__(self, tiles: np.ndarray, overview: np.ndarray, after: list[int], token: int, count: int) -> None:
        self.tiles, self.overview, self.after = tiles, overview, after
        self._token, self._count = token, count

    @classmethod
    def read(cls, tile_ids: TileIds, token: int, count: int, most: int) -> _Names | None:
        """From pictures cut into up to `most` x `most` tiles; None if a tile's name depends on how many there are."""
        alone = _between(tile_ids(0, 0), token, count)
        if len(alone) != 2:
            return None
        parts = {size: _between(tile_ids(size, size), token, count) for size in ({most} if most else set())}
        if any(len(found) != most**2 + 2 for found in parts.values()):
            return None
        cut_up = parts.get(most, alone)
        table = _table(cut_up[:-2])
        tiles = table.reshape(most, most, table.shape[1])
        names = cls(tiles, _table([alone[0], cut_up[-2]]), cut_up[-1], token, count)
        sizes = [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most + 1)]
        tried = [(0, 0), *sizes] if most <= 4 else [(0, 0), (1, most), (most, 1), (2, 3), (3, 2), (most, most)]
        return names if all(names.ids(*size) == tile_ids(*size) for size in tried) else None

    def ids(self, rows: int, columns: int) -> list[int]:
        """The tokens of a picture, put together as the nodes do."""
        features = [self._token] * self._count
        table = self.tiles[:rows, :columns].reshape(rows * columns, self.tiles.shape[2]).tolist()
        found = [number for name in table for number in [*name, *features]]
        found += [*self.overview[int(rows > 0)].tolist(), *features, *self.after]
        return [number for number in found if number != NONE]

    def nodes(self, write: Nodes, rows: ir.Value, columns: ir.Value) -> ir.Value:
        """The same for numbers that the graph computes: int64 `[tokens]`."""
        names = write(
            "Slice", self.tiles, np.zeros(2, np.int64), write.joined(rows, columns), np.array([0, 1], np.int64)
        )
        shape = write.joined(rows, columns, self._count)
        features = write("Expand", self._token, shape)
        tiles = write("Reshape", write("Concat", names, features, axis=2), np.array([-1], np.int64))
        cut_up: Operand = write("Min", rows, 1)
        overview = write("Gather", self.overview, cut_up)
        after = np.array(self.after, np.int64)
        every = write("Concat", tiles, overview, repeated(write, self._token, self._count), after, axis=0)
        return write("Compress", every, write("GreaterOrEqual", every, 0))


def _between(ids: list[int], token: int, count: int) -> list[list[int]]:
    """The tokens around each run of `count` features; empty if features come in other numbers."""
    parts: list[list[int]] = [[]]
    place = 0
    while place < len(ids):
        if ids[place] != token:
            parts[-1].append(ids[place])
            place += 1
            continue
        if ids[place : place + count] != [token] * count:
            return []
        parts.append([])
        place += count
    return parts


def _table(rows: list[list[int]]) -> np.ndarray:
    """int64 `[rows, longest]`, filled up with `NONE`."""
    longest = max((len(row) for row in rows), default=0)
    table = np.full((len(rows), longest), NONE, np.int64)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return table
