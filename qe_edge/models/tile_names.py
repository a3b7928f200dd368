"""The tokens of a picture in tiles, each of which has its place named, as nodes of `preprocess.onnx`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from qe_edge.models.graph_nodes import Nodes, Operand
from qe_edge.models.tile_pictures import repeated

NONE = -1  # where a row of a table of tokens has ended
TileIds = Callable[[int, int], list[int]]


class TileNames:
    """What stands before, between and after the features of a picture's tiles.

    Attributes:
        tiles: `[rows, columns, tokens]`, the tokens before each tile's features, filled up with `NONE`.
        overview: `[2, tokens]`, the tokens before the overview's features of a picture that is not cut, and of one
            that is.
        after: The tokens after the overview's features.

    Example:
        >>> def tile_ids(rows: int, columns: int) -> list[int]:
        ...     places = [(row, column) for row in range(rows) for column in range(columns)]
        ...     return [token for row, column in places for token in (100 + 10 * row + column, 9)] + [8, 9, 7]
        >>> TileNames.read(tile_ids, token=9, count=1, most=4).ids(1, 2)
        [100, 9, 101, 9, 8, 9, 7]
    """

    def __init__(self, parts: Sequence[list[int]], alone: list[int], token: int, counts: tuple[int, int]) -> None:
        most = round(len(parts[:-2]) ** 0.5)
        table = filled_up(parts[:-2])
        self.tiles = table.reshape(most, most, table.shape[1])
        self.overview, self.after = filled_up([alone, parts[-2]]), parts[-1]
        self._token, (self._count, self._shown) = token, counts

    @classmethod
    def read(cls, tile_ids: TileIds, token: int, count: int, most: int, *, overview: bool = True) -> TileNames | None:
        """From pictures cut into up to `most` x `most` tiles; None if a tile's name depends on how many there are.

        Args:
            tile_ids: Tokens of a picture of so many rows and columns of tiles, 0 where it is not cut.
            token: That of a feature.
            count: Features of a tile, and of the overview.
            most: 0 if no picture is cut.
            overview: Whether there is one beside tiles; a picture that is not cut is one.
        """
        alone = between(tile_ids(0, 0), token, count)
        parts = between(tile_ids(most, most), token, count) if most else alone
        if most and not overview:
            parts.insert(len(parts) - 1, [])
        if len(alone) != 2 or len(parts) != most**2 + 2:
            return None
        names = cls(parts, alone[0], token, (count, count if overview else 0))
        every = [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most + 1)]
        tried = every[1:] if most <= 4 else [(1, most), (most, 1), (2, 3), (3, 2), (most, most)]
        return names if all(names.ids(*size) == tile_ids(*size) for size in [(0, 0), *tried]) else None

    def ids(self, rows: int, columns: int) -> list[int]:
        """The tokens of a picture, put together as the nodes do."""
        features = [self._token] * self._count
        table = self.tiles[:rows, :columns].reshape(rows * columns, self.tiles.shape[2]).tolist()
        found = [number for name in table for number in [*name, *features]]
        shown = [self._token] * (self._shown if rows else self._count)
        found += [*self.overview[int(rows > 0)].tolist(), *shown, *self.after]
        return [number for number in found if number != NONE]

    def nodes(
        self, write: Nodes, rows: ir.Value, columns: ir.Value, counts: tuple[Operand, Operand] | None = None
    ) -> ir.Value:
        """The same for numbers that the graph computes: int64 `[tokens]`.

        Args:
            write: Receives the nodes.
            rows: Of tiles, 0 where the picture is not cut.
            columns: Of tiles.
            counts: Features of a tile and of the overview, if there are others than those that were read.
        """
        of_tile, shown = counts or (self._count, self._count)
        tiles = named_tiles(write, self.tiles, (rows, columns), self._token, of_tile)
        overview = write("Gather", self.overview, write("Min", rows, 1))
        features = repeated(write, self._token, shown)
        return without_none(write, tiles, overview, features, np.array(self.after, np.int64))


def named_tiles(
    write: Nodes, table: np.ndarray, grid: tuple[ir.Value, ir.Value], token: int, count: Operand
) -> ir.Value:
    """Every tile's name and features, int64 `[tokens]`, perhaps with `NONE` among them.

    Args:
        write: Receives the nodes.
        table: int64 `[most rows, most columns, tokens]`.
        grid: Rows and columns of tiles.
        token: That of a feature.
        count: Features of a tile.

    Example:
        >>> write = Nodes()
        >>> grid = write.constant(1), write.constant(2)
        >>> _ = named_tiles(write, np.zeros((4, 4, 3), np.int64), grid, token=9, count=256)
        >>> write.nodes[-1].op_type
        'Reshape'
    """
    names = write("Slice", table, np.zeros(2, np.int64), write.joined(*grid), np.array([0, 1], np.int64))
    features = write("Expand", token, write.joined(*grid, count))
    return write.reshape(write("Concat", names, features, axis=2), -1)


def without_none(write: Nodes, *parts: Operand) -> ir.Value:
    """Parts, int64 `[tokens]`, one after the other without `NONE`.

    Example:
        >>> write = Nodes()
        >>> _ = without_none(write, np.array([3, NONE]), np.array([4]))
        >>> write.nodes[-1].op_type
        'Compress'
    """
    every = write("Concat", *parts, axis=0)
    return write("Compress", every, write("GreaterOrEqual", every, 0))


def between(ids: list[int], token: int, count: int) -> list[list[int]]:
    """The tokens around each run of `count` features; empty if features come in other numbers.

    Example:
        >>> between([1, 9, 9, 2, 3, 9, 9], token=9, count=2)
        [[1], [2, 3], []]
    """
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


def filled_up(rows: Sequence[list[int]]) -> np.ndarray:
    """int64 `[rows, longest]`, filled up with `NONE`.

    Example:
        >>> filled_up([[5], [6, 7]]).tolist()
        [[5, -1], [6, 7]]
    """
    longest = max((len(row) for row in rows), default=0)
    table = np.full((len(rows), longest), NONE, np.int64)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return table
