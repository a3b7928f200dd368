"""`preprocess.onnx` of Phi-4-multimodal: a picture is scaled into a grid of crops, and a copy in one crop precedes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qe_edge.models.graph_nodes import Nodes
from qe_edge.models.phi4_multimodal import FIRST, LINE_END, SEPARATOR
from qe_edge.models.phi4_multimodal_processor import HALFWAY, SMALLEST, WHITE
from qe_edge.models.picture_graphs import (
    PictureGraph,
    counted,
    finished,
    none_if,
    normalized,
    output,
    picture_input,
    table_of,
)
from qe_edge.models.pillow_resize import BILINEAR, resize_as_torch
from qe_edge.models.tile_pictures import cut, nearest_grid, repeated

INT64, FLOAT, DOUBLE = ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.DOUBLE


@dataclass(frozen=True)
class _Layout:
    """As the image processor's, in nodes; that of a refused picture is one full crop."""

    rows: ir.Value
    columns: ir.Value
    height: ir.Value
    width: ir.Value
    refused: ir.Value


def picture_graph(processor: Any, image_token: int, side: int) -> PictureGraph:  # noqa: ANN401 - share no typed base
    """The graph of a model.

    Args:
        processor: A `Phi4MultimodalImageProcessorPil`.
        image_token: The token of a feature, and the one that stands for a picture.
        side: Tokens per side of a crop.

    Example:
        >>> from qe_edge.models.phi4_multimodal_processor import Phi4MultimodalImageProcessorPil
        >>> list(picture_graph(Phi4MultimodalImageProcessorPil(), image_token=9, side=16).outputs)
        ['pixel_values', 'patch_mask', 'token_places', 'placeholder_ids', 'placeholder_positions']
    """
    write, image = Nodes(), picture_input()
    crop, patch = int(processor.size["height"]), int(processor.patch_size)
    layout = _layout(write, image, processor)
    scaled = resize_as_torch(write, image, layout.height, layout.width, BILINEAR)
    sizes = ((layout.rows, layout.height), (layout.columns, layout.width))
    filling = [write("Sub", write("Mul", count, crop), size) for count, size in sizes]
    white = write("Pad", scaled, write.joined(0, 0, 0, *filling, 0), np.array(WHITE, np.uint8))
    table = table_of(processor.normalized)
    crops = normalized(write, cut(write, white, layout.rows, layout.columns, (crop, crop)), table, channel=-3)
    pixels = write("Concat", _whole(write, white, layout, table, crop), crops, axis=0)
    seen = [
        write("Sub", write("Mul", count, crop // patch), write("Div", empty, patch))
        for (count, _), empty in zip(sizes, filling, strict=True)
    ]
    places = _places(write, seen, layout.columns, side)
    feeds = {
        "pixel_values": output(pixels, FLOAT, "crops", 3, crop, crop),
        "patch_mask": output(_mask(write, seen, layout, crop // patch), FLOAT, "crops", crop // patch, crop // patch),
        "token_places": output(places, INT64, "tokens"),
    }
    ids = none_if(write, layout.refused, repeated(write, image_token, write.size(places, 0)))
    return finished(write, image, feeds, counted(write, ids), image_token)


def _layout(write: Nodes, image: ir.Value, processor: Any) -> _Layout:  # noqa: ANN401 - share no typed base
    crop = int(processor.size["height"])
    height, width = write.size(image, 0), write.size(image, 1)
    rows, columns = (write("Div", write("Add", size, crop - 1), crop) for size in (height, width))
    fitted = nearest_grid(write, image, processor.grids(), crop**2)
    many = write("Greater", write("Mul", rows, columns), processor.dynamic_hd)
    columns, rows = (write("Where", many, *pair) for pair in ((fitted[0], columns), (fitted[1], rows)))
    full = [write("Mul", count, crop) for count in (rows, columns)]
    real = [write.cast(size, DOUBLE) for size in (height, width)]
    down, across = (write("Div", write.cast(size, DOUBLE), old) for size, old in zip(full, real, strict=True))
    wide = write("Less", across, down)
    heights = write("Where", wide, write.cast(write("Mul", real[0], across), INT64), full[0])
    widths = write("Where", wide, full[1], write.cast(write("Mul", real[1], down), INT64))
    refused = write("Less", write("Min", heights, widths), SMALLEST)
    found = ((rows, 1), (columns, 1), (heights, crop), (widths, crop))
    rows, columns, heights, widths = (write("Where", refused, small, value) for value, small in found)
    return _Layout(rows, columns, heights, widths, refused)


def _whole(write: Nodes, white: ir.Value, layout: _Layout, table: np.ndarray, crop: int) -> ir.Value:
    """The picture and its filling in one crop, float32 `[1, 3, crop, crop]`."""
    halfway = np.array(HALFWAY)
    planes = white
    for axis, count in ((1, layout.columns), (0, layout.rows)):
        odd = write("Equal", write("Mod", count, 2), 1)  # the middle one of every few pixels
        weights = write("Where", odd, np.array([0.0, 1.0, 0.0, 0.0]), halfway)
        middle = write("Add", write("Mul", write.count(crop), count), write("Div", count, 2))
        first = write("Add", middle, write("Where", odd, -1, -2))
        last = write("Sub", write("Mul", count, crop), 1)
        taps = []
        for tap in range(len(HALFWAY)):
            place = write("Max", write("Min", write("Add", first, tap), last), 0)
            pixels = write("Gather", planes, place, axis=axis)
            values = normalized(write, pixels, table, channel=-1) if axis == 1 else pixels
            taps.append((write.cast(values, DOUBLE), write("Gather", weights, tap)))
        planes = write.cast(write("Mul", *taps[1]), FLOAT)
        for tap in (0, 2, 3):  # in the image processor's order, rounded after every step
            total = write("Add", write("Mul", *taps[tap]), write.cast(planes, DOUBLE))
            planes = write.cast(total, FLOAT)
    return write.spread(write("Transpose", planes, perm=[2, 0, 1]), 0)


def _mask(write: Nodes, seen: list[ir.Value], layout: _Layout, patches: int) -> ir.Value:
    """float32 `[crops, patches, patches]`, 1 on the first one and where something is seen."""
    down, across = (
        write("Less", write.count(write("Mul", count, patches)), size)
        for count, size in zip((layout.rows, layout.columns), seen, strict=True)
    )
    mask = write.cast(write("And", write.spread(down, 1), write.spread(across, 0)), FLOAT)
    parted = write.reshape(mask, layout.rows, patches, layout.columns, patches)
    crops = write.reshape(write("Transpose", parted, perm=[0, 2, 1, 3]), -1, patches, patches)
    return write("Concat", np.ones((1, patches, patches), np.float32), crops, axis=0)


def _places(write: Nodes, seen: list[ir.Value], columns: ir.Value, side: int) -> ir.Value:
    """Places of the tokens, int64 `[tokens]`: the crops line by line without filling, then the whole picture."""
    row, column = (write.count(write("Div", write("Add", size, 1), 2)) for size in seen)
    crop = write("Mul", write("Div", row, side), columns)
    line = write("Add", write("Mul", crop, side**2), write("Mul", write("Mod", row, side), side))
    inside = write("Add", write("Mul", write("Div", column, side), side**2), write("Mod", column, side))
    crops = write("Add", write("Add", write.spread(line, 1), write.spread(inside, 0)), FIRST + side**2)
    ended = write("Pad", crops, np.array([0, 0, 0, 1], np.int64), LINE_END)
    whole = np.pad(FIRST + np.arange(side**2).reshape(side, side), ((0, 0), (0, 1)), constant_values=LINE_END)
    return write("Concat", write.reshape(ended, -1), np.array([SEPARATOR, *whole.ravel()], np.int64), axis=0)
