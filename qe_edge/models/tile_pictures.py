"""`preprocess.onnx` of families that scale a picture to whole tiles of one size, or to one tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qe_edge.models.graph_nodes import Nodes, Operand
from qe_edge.models.picture_graphs import (
    PictureGraph,
    counted,
    finished,
    normalized,
    output,
    picture_input,
    value_table,
)
from qe_edge.models.pillow_resize import FILTERS, resize


def cut(write: Nodes, pixels: ir.Value, rows: Operand, columns: Operand, tile: tuple[int, int]) -> ir.Value:
    """uint8 tiles `[tiles, 3, height, width]`, row by row, of a picture `[rows * height, columns * width, 3]`.

    Example:
        >>> write = Nodes()
        >>> _ = cut(write, picture_input(), rows=2, columns=2, tile=(448, 448))
        >>> [node.op_type for node in write.nodes]
        ['Constant', 'Reshape', 'Transpose', 'Constant', 'Reshape']
    """
    height, width = tile
    parted = write.reshape(pixels, rows, height, columns, width, 3)
    return write.reshape(write("Transpose", parted, perm=[0, 2, 4, 1, 3]), -1, 3, height, width)


def pixel_values(write: Nodes, tiles: ir.Value, image_processor: Any, tile: tuple[int, int]) -> dict[str, ir.Value]:  # noqa: ANN401
    """The visual encoder's one input of uint8 tiles `[tiles, 3, height, width]`.

    Example:
        >>> from qe_edge.models.image_processors import pil_image_processor
        >>> write = Nodes()
        >>> tiles = cut(write, picture_input(), 1, 1, (224, 224))
        >>> values = pixel_values(write, tiles, pil_image_processor("siglip")(), (224, 224))
        >>> {name: str(value.shape) for name, value in values.items()}
        {'pixel_values': '[tiles,3,224,224]'}
    """
    values = normalized(write, tiles, value_table(image_processor), channel=-3)
    return {"pixel_values": output(write("Identity", values), ir.DataType.FLOAT, "tiles", 3, *tile)}


def repeated(write: Nodes, token: int, count: Operand) -> ir.Value:
    """int64 `[count]` of one token.

    Example:
        >>> write = Nodes()
        >>> _ = repeated(write, token=9, count=256)
        >>> write.nodes[-1].op_type
        'Expand'
    """
    return write("Expand", token, write.joined(count))


def single_tile(image_processor: Any, ids: Sequence[int], placeholder: int) -> PictureGraph | None:  # noqa: ANN401
    """The graph of a family that scales every picture to one size; None if its image processor does something else.

    Args:
        image_processor: A `PilBackend` whose `size` has a height and a width.
        ids: The tokens of a picture.
        placeholder: The token that they replace.

    Example:
        >>> from qe_edge.models.image_processors import pil_image_processor
        >>> graph = single_tile(pil_image_processor("siglip")(), ids=[9] * 256, placeholder=9)
        >>> list(graph.outputs)
        ['pixel_values', 'placeholder_ids', 'placeholder_positions']
    """
    if not image_processor.do_resize or image_processor.resample not in FILTERS:
        return None
    write, image = Nodes(), picture_input()
    tile = image_processor.size["height"], image_processor.size["width"]
    tiles = cut(write, resize(write, image, *tile, image_processor.resample), 1, 1, tile)
    tokens = counted(write, write.constant(np.array(ids, np.int64)))
    return finished(write, image, pixel_values(write, tiles, image_processor, tile), tokens, placeholder)


def best_grid(
    image_processor: Any,  # noqa: ANN401 - image processors share no typed base
    between: tuple[Sequence[int], int, Sequence[int]],
    tokens_of_tile: int,
    placeholder: int,
) -> PictureGraph | None:
    """The graph of InternVL: the grid of tiles whose shape is nearest to the picture's, and an overview.

    Args:
        image_processor: A `GotOcr2ImageProcessorPil`.
        between: Tokens before a picture, the token of its features, tokens after it.
        tokens_of_tile: How many features a tile has.
        placeholder: The token that a picture's tokens replace.

    Example:
        >>> from qe_edge.models.image_processors import pil_image_processor
        >>> processor = pil_image_processor("got_ocr2")(size={"height": 448, "width": 448}, max_patches=12)
        >>> graph = best_grid(processor, between=([7], 9, [8]), tokens_of_tile=256, placeholder=9)
        >>> list(graph.outputs), graph.placeholder
        (['pixel_values', 'placeholder_ids', 'placeholder_positions'], 9)
    """
    if image_processor.resample not in FILTERS:
        return None
    if image_processor.max_patches == 1:
        ids = [*between[0], *[between[1]] * tokens_of_tile, *between[2]]
        return single_tile(image_processor, ids, placeholder)
    write, image = Nodes(), picture_input()
    tile = image_processor.size["height"], image_processor.size["width"]
    most, fewest = image_processor.max_patches, image_processor.min_patches
    found = [(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if fewest <= c * r <= most]
    grids = sorted(found, key=lambda grid: grid[0] * grid[1])
    columns, rows = nearest_grid(write, image, grids, tile[0] * tile[1])
    large = resize(write, image, write("Mul", rows, tile[0]), write("Mul", columns, tile[1]), image_processor.resample)
    overview = cut(write, resize(write, image, *tile, image_processor.resample), 1, 1, tile)
    count = write("Mul", rows, columns)
    # one tile is its own overview
    count = write("Where", write("Equal", count, 1), 1, write("Add", count, 1))
    both = write("Concat", cut(write, large, rows, columns, tile), overview, axis=0)
    tiles = write("Slice", both, write.joined(0), write.joined(count))
    features = repeated(write, between[1], write("Mul", count, tokens_of_tile))
    before, after = (np.array(ids, np.int64) for ids in (between[0], between[2]))
    tokens = counted(write, write("Concat", before, features, after, axis=0))
    return finished(write, image, pixel_values(write, tiles, image_processor, tile), tokens, placeholder)


def nearest_grid(
    write: Nodes, image: ir.Value, grids: Sequence[tuple[int, int]], area: int
) -> tuple[ir.Value, ir.Value]:
    """Columns and rows of tiles, as transformers' `get_optimal_tiled_canvas`: of equally near grids the last large one.

    A grid is large enough to be preferred if the picture has more than half of its pixels.

    Args:
        write: Receives the nodes.
        image: uint8 `[height, width, 3]`.
        grids: Columns and rows that a picture may have, in the order in which they are tried.
        area: Pixels of a tile.

    Example:
        >>> write = Nodes()
        >>> _ = nearest_grid(write, picture_input(), grids=[(1, 1), (1, 2), (2, 1)], area=448 * 448)
        >>> [node.op_type for node in write.nodes].count("ArgMin")
        1
    """
    table = np.array(grids, np.int64)
    height, width = (write.cast(write.size(image, axis), ir.DataType.DOUBLE) for axis in (0, 1))
    distance = write("Abs", write("Sub", write("Div", width, height), table[:, 0] / table[:, 1]))
    nearest = write("Equal", distance, write("ReduceMin", distance, keepdims=0))
    halves = 0.5 * area * table[:, 0] * table[:, 1]
    preferred = write("And", nearest, write("Greater", write("Mul", width, height), halves))
    number = np.arange(len(table), dtype=np.int64)
    last = write("ReduceMax", write("Where", preferred, number, -1), keepdims=0)
    chosen = write("Max", last, write("ArgMin", distance, axis=0, keepdims=0))
    column, row = (write("Gather", np.ascontiguousarray(table[:, axis]), chosen) for axis in (0, 1))
    return column, row
