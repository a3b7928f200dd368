"""The tokens of a picture of MiniCPM-V 4.6: its number, the whole of it, and its slices line by line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qe_edge.models.graph_nodes import Nodes
from qe_edge.models.minicpmv4_6_slices import MARKS, slices_text
from qe_edge.models.tile_names import NONE, between, filled_up, named_tiles, without_none
from qe_edge.models.tile_pictures import repeated

PictureIds = Callable[[int | None, list[int], int], list[int]]
Label = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
NUMBERS = (*range(120), 999, 1000)  # of pictures, with which a label is tried
GRIDS = ((1, 2), (2, 1), (2, 3), (3, 2))


class SliceTokens:
    """What stands around the features of a picture and of its slices.

    Args:
        first: Tokens before the features of the whole picture.
        joints: Those before the features of the first slice, of the first one of another line, and of any other.
        after: The last tokens of a picture that is not cut, and of one that is.
        image: The token of a feature, and the one that stands for a picture.
        most: Most rows and columns of slices.

    Attributes:
        label: The tokens of a picture's number, as `PictureGraph` has them.

    Example:
        >>> SliceTokens([1], [[2, 3], [4, 5, 3], [4, 3]], [[2], [4]], image=9, most=9).ids(2, 1, [4, 1])
        [1, 9, 9, 9, 9, 2, 3, 9, 4, 5, 3, 9, 4]
    """

    def __init__(
        self, first: list[int], joints: Sequence[list[int]], after: Sequence[list[int]], image: int, most: int
    ) -> None:
        self.image = image
        self.label: Label | None = None
        self._first, self._after = first, filled_up(after)
        beginning, line, inside = filled_up(joints)
        self._table = np.tile(inside, (most, most, 1))
        self._table[:, 0] = line
        self._table[0, 0] = beginning

    @classmethod
    def read(cls, picture_ids: PictureIds, image: int, most: int, *, numbered: bool) -> SliceTokens | None:
        """From a tokenizer; None if it writes pictures in another way.

        Args:
            picture_ids: Tokens of a picture of its number or None, the features of the whole and of every slice, and
                the columns of slices.
            image: The token of a feature.
            most: Most slices.
            numbered: Whether the number of a picture stands before it.
        """
        alone, cut = between(picture_ids(None, [1], 0), image, 1), between(picture_ids(None, [1] * 5, 2), image, 1)
        if len(alone) != 2 or len(cut) != 6:
            return None
        tokens = cls(alone[0], [cut[1], cut[3], cut[2]], [alone[1], cut[5]], image, most)
        for rows, columns in [(0, 0), *(grid for grid in GRIDS if max(grid) <= most)]:
            counts = [4, *[2] * (rows * columns)]
            if tokens.ids(rows, columns, counts[:2]) != picture_ids(None, counts, columns):
                return None
        if numbered:
            tokens.label = _label(picture_ids)
        return tokens if not numbered or tokens.label is not None else None

    def ids(self, rows: int, columns: int, counts: Sequence[int]) -> list[int]:
        """The tokens of a picture, put together as the nodes do; `counts` are features of the whole and of a slice."""
        names = [name for line in self._table[:rows, :columns].tolist() for name in line]
        slices = [number for name in names for number in [*name, *[self.image] * counts[-1]]]
        found = [*self._first, *[self.image] * counts[0], *slices, *self._after[int(rows > 0)].tolist()]
        return [number for number in found if number != NONE]

    def nodes(self, write: Nodes, grid: tuple[ir.Value, ir.Value], counts: Sequence[ir.Value]) -> ir.Value:
        """The same for numbers that the graph computes: int64 `[tokens]`; rows and columns are 0 without slices."""
        slices = named_tiles(write, self._table, grid, self.image, counts[1])
        after = write("Gather", self._after, write("Min", grid[0], 1))
        whole = repeated(write, self.image, counts[0])
        return without_none(write, np.array(self._first, np.int64), whole, slices, after)


def tokens_of(tokenizer: Any, image: int, settings: Any) -> SliceTokens | None:  # noqa: ANN401 - share no typed base
    """The tokens of a model; None if its tokenizer writes pictures in another way.

    Args:
        tokenizer: Names the marks around features.
        image: The token of a feature.
        settings: The model's image processor.

    Example:
        `tokens_of(processor.tokenizer, family.config.image_token_id, processor.image_processor)`
    """
    word = tokenizer.convert_ids_to_tokens(image)
    id_start, id_end = (getattr(tokenizer, f"{name}_token") for name in MARKS[:2])

    def picture_ids(number: int | None, counts: list[int], across: int) -> list[int]:
        said = "" if number is None else f"{id_start}{number}{id_end}"
        text = said + slices_text(tokenizer, word, counts, across)
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return SliceTokens.read(picture_ids, image, settings.max_slice_nums, numbered=settings.use_image_id)


def _label(picture_ids: PictureIds) -> Label | None:
    """The tokens of a picture's number; None if a number is not written digit by digit."""
    plain = picture_ids(None, [1], 0)
    said = [picture_ids(number, [1], 0)[: -len(plain)] for number in NUMBERS]
    zero, one = said[0], said[1]
    start = next((place for place, pair in enumerate(zip(zero, one, strict=False)) if pair[0] != pair[1]), len(zero))
    before, after = tuple(zero[:start]), tuple(zero[start + 1 :])
    digits = tuple(ids[start] if len(ids) == len(zero) else NONE for ids in said[:10])
    wanted = [[*before, *(digits[int(digit)] for digit in str(number)), *after] for number in NUMBERS]
    return (before, digits, after) if said == wanted and start < len(zero) else None
