"""`preprocess.onnx` of LFM2-VL: a large picture is cut into tiles, which are one run; the whole of it is another."""

from __future__ import annotations

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
    table_of,
)
from qe_edge.models.pillow_resize import FILTERS, resize_as_torch
from qe_edge.models.qwen_vl_pictures import bounded, in_groups
from qe_edge.models.tile_names import TileIds, TileNames
from qe_edge.models.tile_pictures import nearest_grid

INT64, FLOAT, DOUBLE = ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.DOUBLE


def picture_graph(processor: Any, tile_ids: TileIds, image_token: int, side: int) -> PictureGraph | None:  # noqa: ANN401
    """The graph; None if the image processor or the tokenizer does what it cannot.

    Args:
        processor: An `Lfm2VlImageProcessorPil`.
        tile_ids: Tokens of a picture of so many rows and columns of tiles, 0 where it is not cut, with one feature of
            each image.
        image_token: The token of a feature, and the one that stands for a picture.
        side: That of the vision encoder's learnt grid of positions.

    Example:
        >>> from qe_edge.models.lfm2_vl_processor import Lfm2VlImageProcessorPil
        >>> def tile_ids(rows: int, columns: int) -> list[int]:
        ...     places = [(row, column) for row in range(rows) for column in range(columns)]
        ...     return [1, *(token for r, c in places for token in (100 + 10 * r + c, 9)), 8, 9, 2]
        >>> [*picture_graph(Lfm2VlImageProcessorPil(), tile_ids, image_token=9, side=16).outputs][:4]
        ['pixel_values', 'point_weights', 'pixel_values.2', 'point_weights.2']
    """
    tile, factor = processor.tile_size, processor.downsample_factor
    unit = factor * processor.encoder_patch_size
    most = processor.max_tiles if processor.do_image_splitting and processor.max_tiles > 1 else 0
    overview = processor.use_thumbnail
    names = TileNames.read(tile_ids, image_token, 1, most, overview=overview)
    if processor.resample not in FILTERS or names is None:
        return None
    write, image = Nodes(), picture_input()
    height, width, large = _size(write, image, processor)
    rows = columns = shown = write.constant(0)
    if most:
        grid = nearest_grid(write, image, processor.grids(), tile**2)
        cut = write("And", large, write("Greater", write("Mul", *grid), 1))
        columns, rows = (write("Where", cut, count, 0) for count in grid)
        shown = rows if not overview else shown
    full = [write("Mul", write("Max", count, 1), tile) for count in (rows, columns)]
    pixels = resize_as_torch(write, image, full[0], full[1], processor.resample)
    tiles = _patches(write, pixels, (tile // unit, tile // unit), processor)
    tiles = write("Slice", tiles, write.joined(0), write.joined(write("Mul", rows, columns)))
    down, across = (write("Div", size, unit) for size in (height, width))
    whole = _patches(write, resize_as_torch(write, image, height, width, processor.resample), (down, across), processor)
    count = write("Where", write("Greater", shown, 0), 0, 1)  # without an overview, tiles alone
    whole = write("Slice", whole, write.joined(0), write.joined(count))
    values = 3 * processor.encoder_patch_size**2
    feeds = {}
    for end, images, size in (("", tiles, (tile // unit, tile // unit)), (".2", whole, (down, across))):
        weights = _weights(write, size, factor, side)
        feeds[f"pixel_values{end}"] = output(images, FLOAT, f"images{end}", f"patches{end}", values)
        feeds[f"point_weights{end}"] = output(weights, FLOAT, 1, f"patches{end}", side**2)
    features = (tile // unit) ** 2, write("Mul", count, write("Mul", down, across))
    ids = names.nodes(write, rows, columns, features)
    return finished(write, image, feeds, counted(write, ids), image_token)


def _size(write: Nodes, image: ir.Value, processor: Any) -> tuple[ir.Value, ir.Value, ir.Value]:  # noqa: ANN401
    """Height and width of the whole picture as one image, and whether it is too large for one."""
    unit = processor.encoder_patch_size * processor.downsample_factor
    fewest, most = (tokens * unit**2 for tokens in (processor.min_image_tokens, processor.max_image_tokens))
    sides = [write.cast(write.size(image, axis), DOUBLE) for axis in (0, 1)]
    near = [write("Mul", write("Round", write("Div", side, float(unit))), float(unit)) for side in sides]
    # transformers measures with the side of a patch at least, not of a token
    reached = write("Mul", *(write("Max", side, float(processor.encoder_patch_size)) for side in near))
    large = write("Greater", reached, float(most * processor.max_pixels_tolerance))
    height, width = bounded(write, sides, [write("Max", side, float(unit)) for side in near], unit, (fewest, most))
    return height, width, large


def _patches(write: Nodes, pixels: ir.Value, size: tuple[Operand, Operand], processor: Any) -> ir.Value:  # noqa: ANN401
    """float32 `[images, patches, values]` of images of `size` tokens, row by row; patches of a token are together."""
    patch, factor = processor.encoder_patch_size, processor.downsample_factor
    down, across = size
    rows = write("Div", write("Div", write.size(pixels, 0), factor * patch), down)
    parted = write.reshape(pixels, rows, down, factor * patch, -1, across, factor * patch, 3)
    images = write("Transpose", parted, perm=[0, 3, 1, 4, 2, 5, 6])  # images, tokens, pixels of a token
    parted = write.reshape(images, -1, factor, patch, factor, patch, 3)
    patches = write.reshape(write("Transpose", parted, perm=[0, 1, 3, 2, 4, 5]), -1, patch**2, 3)
    values = normalized(write, patches, table_of(processor.normalized), channel=-1)
    return write.reshape(values, -1, write("Mul", write("Mul", down, across), factor**2), 3 * patch**2)


def _weights(write: Nodes, size: tuple[Operand, Operand], factor: int, side: int) -> ir.Value:
    """float32 `[1, patches, points]`, as `qe_edge.models.lfm2_vl.Lfm2VL.visual_feeds`."""
    rows, columns = (_stretched(write, write("Mul", count, factor), side) for count in size)
    along, across = (np.array(axes, np.int64) for axes in ([1, 3], [0, 2]))
    weights = write("Mul", write("Unsqueeze", rows, along), write("Unsqueeze", columns, across))
    flat = write.reshape(weights, write.size(weights, 0), write.size(weights, 1), side**2)
    return write.cast(write.reshape(in_groups(write, flat, factor, side**2), 1, -1, side**2), FLOAT)


def _stretched(write: Nodes, size: ir.Value, side: int) -> ir.Value:
    """float64 `[size, side]`, as `qe_edge.models.lfm2_vl.stretched`."""
    scale = write("Div", float(side), write.cast(size, DOUBLE))
    reach = write("Max", scale, 1.0)
    center = write.spread(write("Mul", scale, write("Add", write.cast(write.count(size), DOUBLE), 0.5)), 1)
    first = write("Max", write.cast(write("Add", write("Sub", center, reach), 0.5), INT64), 0)
    end = write("Min", write.cast(write("Add", write("Add", center, reach), 0.5), INT64), side)
    place = np.arange(side, dtype=np.int64)
    away = write("Div", write("Add", write("Sub", place.astype(np.float64), center), 0.5), reach)
    weights = write("Max", write("Sub", 1.0, write("Abs", away)), 0.0)
    used = write("And", write("GreaterOrEqual", place, first), write("Less", place, end))
    weights = write("Where", used, weights, 0.0)
    total = write("Gather", write("CumSum", weights, 1), np.array([side - 1], np.int64), axis=1)
    return write("Div", weights, total)
