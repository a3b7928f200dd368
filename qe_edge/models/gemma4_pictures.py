"""`preprocess.onnx` of Gemma 4: a picture keeps its shape, is scaled to a number of tokens, and is cut into patches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from qe_edge.models.graph_nodes import Nodes
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
from qe_edge.models.qwen_vl_pictures import in_groups

INT64, FLOAT, DOUBLE = ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.DOUBLE


def picture_graph(processor: Any, marks: tuple[int, int, int], *, numbered: bool) -> PictureGraph | None:  # noqa: ANN401
    """The graph of a model; None if its image processor does what no graph here does.

    Args:
        processor: A `Gemma4ImageProcessorPil`.
        marks: The token before a picture, that of each of its features, and the token after it.
        numbered: As in `PictureGraph`.

    Example:
        >>> from qe_edge.models.image_processors import pil_image_processor
        >>> found = picture_graph(pil_image_processor("gemma4")(), marks=(7, 8, 9), numbered=False)
        >>> list(found.outputs)
        ['pixel_values', 'position_ids', 'placeholder_ids', 'placeholder_positions']
    """
    if not processor.do_resize or processor.resample not in FILTERS:
        return None
    write, image = Nodes(), picture_input()
    patch, side = processor.patch_size, processor.pooling_kernel_size
    height, width = _target_size(write, image, processor)
    rows, columns = (write("Div", size, patch) for size in (height, width))
    down, across = (write("Div", size, side) for size in (rows, columns))
    pixels = resize(write, image, height, width, processor.resample)
    parted = write.reshape(pixels, down, side, patch, across, side, patch, 3)
    patches = write.reshape(write("Transpose", parted, perm=[0, 3, 1, 4, 2, 5, 6]), -1, side**2, patch**2, 3)
    values = write.reshape(normalized(write, patches, value_table(processor), channel=-1), 0, side**2, 3 * patch**2)
    shape = write.joined(rows, columns, 1)
    row = write("Expand", write.spread(write.count(rows), 1, 2), shape)
    column = write("Expand", write.spread(write.count(columns), 0, 2), shape)
    places = in_groups(write, write("Concat", column, row, axis=2), side, 2)
    before, feature, after = marks
    features = write("Expand", feature, write.joined(write("Mul", down, across)))
    ids = write("Concat", np.array([before], np.int64), features, np.array([after], np.int64), axis=0)
    feeds = {
        "pixel_values": output(values, FLOAT, "groups", side**2, 3 * patch**2),
        "position_ids": output(places, INT64, "groups", side**2, 2),
    }
    return replace(finished(write, image, feeds, counted(write, ids), feature), numbered=numbered)


def _target_size(write: Nodes, image: ir.Value, processor: Any) -> tuple[ir.Value, ir.Value]:  # noqa: ANN401
    """Height and width after scaling, in float64 as transformers' `get_aspect_ratio_preserving_size`."""
    step = processor.pooling_kernel_size * processor.patch_size
    most = processor.max_soft_tokens
    sides = [write.cast(write.size(image, axis), DOUBLE) for axis in (0, 1)]
    factor = write("Sqrt", write("Div", float(most * step**2), write("Mul", *sides)))
    units = [write("Floor", write("Div", write("Mul", factor, side), float(step))) for side in sides]
    found = []
    for axis in (0, 1):
        ratio = write("Floor", write("Div", sides[axis], sides[1 - axis]))
        longest = write("Min", ratio, float(most))  # where the other side rounds to 0, and becomes one token
        size = write("Where", write("Equal", units[1 - axis], 0.0), longest, write("Max", units[axis], 1.0))
        found.append(write("Mul", write.cast(size, INT64), step))
    return found[0], found[1]
