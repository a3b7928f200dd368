"""`preprocess.onnx` of Idefics3 and SmolVLM: a picture is scaled twice, cut into tiles, and an overview follows."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qe_edge.models.graph_nodes import Nodes
from qe_edge.models.picture_graphs import PictureGraph, counted, finished, picture_input
from qe_edge.models.pillow_resize import FILTERS, resize
from qe_edge.models.tile_names import TileIds, TileNames
from qe_edge.models.tile_pictures import cut, pixel_values


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
    names = TileNames.read(tile_ids, image_token, count, most if image_processor.do_image_splitting else 0)
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
