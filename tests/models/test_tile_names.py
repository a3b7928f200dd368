"""Tokens around the features of tiles and slices: a tokenizer that writes them in another way has no graph."""

from __future__ import annotations

from qe_edge.models.minicpmv4_6_tokens import SliceTokens
from qe_edge.models.tile_names import TileNames

IMAGE = 9


def tile_ids(rows: int, columns: int) -> list[int]:
    places = [(row, column) for row in range(rows) for column in range(columns)]
    return [1, *(token for row, column in places for token in (100 + 10 * row + column, IMAGE)), 8, IMAGE, 2]


def picture_ids(number: int | None, counts: list[int], across: int) -> list[int]:
    found = [3, *map(int, str(number)), 4] if number is not None else []
    found += [1, *[IMAGE] * counts[0], 2]
    for place, count in enumerate(counts[1:]):
        found += [*([7] if place and place % across == 0 else []), 5, *[IMAGE] * count, 6]
    return found


def test_names_of_tiles() -> None:
    names = TileNames.read(tile_ids, IMAGE, count=1, most=6)
    assert names is not None
    assert names.ids(2, 3) == tile_ids(2, 3)
    assert names.ids(0, 0) == tile_ids(0, 0)


def test_names_that_depend_on_the_number_of_tiles_have_no_graph() -> None:
    assert TileNames.read(lambda r, c: [*tile_ids(r, c), r * c], IMAGE, count=1, most=6) is None
    assert TileNames.read(lambda r, c: [r, *tile_ids(r, c)], IMAGE, count=1, most=4) is None
    assert TileNames.read(lambda r, c: [*tile_ids(r, c), IMAGE], IMAGE, count=1, most=4) is None


def test_tokens_of_slices() -> None:
    tokens = SliceTokens.read(picture_ids, IMAGE, most=9, numbered=True)
    assert tokens is not None
    assert tokens.ids(3, 2, [16, 4]) == picture_ids(None, [16, *[4] * 6], 2)
    assert tokens.label == ((3,), tuple(range(10)), (4,))


def test_slices_that_are_written_in_another_way_have_no_graph() -> None:
    def wide(number: int | None, counts: list[int], across: int) -> list[int]:
        return [*picture_ids(number, counts, across), *([7] if across == 3 else [])]

    def twelve(number: int | None, counts: list[int], across: int) -> list[int]:
        said = [3, 12, 4] if number == 12 else []
        return [*said, *picture_ids(None if said else number, counts, across)]

    assert SliceTokens.read(wide, IMAGE, most=9, numbered=True) is None
    assert SliceTokens.read(twelve, IMAGE, most=9, numbered=True) is None
    assert SliceTokens.read(twelve, IMAGE, most=9, numbered=False) is not None
