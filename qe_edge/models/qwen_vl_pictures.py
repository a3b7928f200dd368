"""`preprocess.onnx` of the Qwen-VL families: a picture is scaled to a size that suits it and cut into patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qe_edge.models.graph_nodes import Nodes
from qe_edge.models.picture_graphs import (
    PictureGraph,
    finished,
    normalized,
    output,
    picture_input,
    placeholders,
    value_table,
)
from qe_edge.models.pillow_resize import FILTERS, resize

MAX_ASPECT = 200  # of transformers' smart_resize
INT64, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT
FrameFeeds = Callable[[Nodes, ir.Value, ir.Value], dict[str, ir.Value]]


def picture_graph(processor: Any, image_token: int, frame_feeds: FrameFeeds) -> PictureGraph | None:  # noqa: ANN401
    """The graph of a family; None if its image processor does what no graph here does.

    Args:
        processor: A `Qwen2VLImageProcessorPil`.
        image_token: The token of every group of patches.
        frame_feeds: Nodes of further inputs of the encoder, of the numbers of rows and columns of patches.

    Example:
        >>> from qe_edge.models.image_processors import pil_image_processor
        >>> processor = pil_image_processor("qwen2_vl")()
        >>> list(picture_graph(processor, image_token=9, frame_feeds=lambda write, rows, columns: {}).outputs)
        ['pixel_values', 'position_ids', 'placeholder_ids', 'placeholder_positions']
    """
    if not processor.do_resize or processor.resample not in FILTERS:
        return None
    write, image = Nodes(), picture_input()
    patch, merge = processor.patch_size, processor.merge_size
    height, width = _target_size(write, image, processor)
    rows, columns = (write("Div", size, patch) for size in (height, width))
    pixels = resize(write, image, height, width, processor.resample)
    down, across = (write("Div", size, merge) for size in (rows, columns))
    parted = write.reshape(pixels, down, merge, patch, across, merge, patch, 3)
    patches = write.reshape(
        write("Transpose", parted, perm=[0, 3, 1, 4, 6, 2, 5]), -1, merge**2, 3, 1, patch**2
    )  # groups, patches of a group, channels, frames, pixels
    values = normalized(write, patches, value_table(processor), channel=-3)
    frames = write("Expand", values, np.array([1, 1, 1, processor.temporal_patch_size, 1], np.int64))
    length = 3 * processor.temporal_patch_size * patch**2
    feeds = {
        "pixel_values": output(write.reshape(frames, 0, merge**2, length), FLOAT, "groups", merge**2, length),
        "position_ids": output(in_groups(write, _places(write, rows, columns), merge, 2), INT64, "groups", merge**2, 2),
        **frame_feeds(write, rows, columns),
    }
    groups = write("Mul", down, across)
    ids = write("Expand", image_token, write.joined(groups))
    places = write("Transpose", write.reshape(_places(write, down, across), -1, 2), perm=[1, 0])
    positions = write("Concat", write("Mul", write("Slice", places, *_row(0)), 0), places, axis=0)
    return finished(write, image, feeds, placeholders(write, ids, positions, 3), image_token, MAX_ASPECT)


def in_groups(write: Nodes, values: ir.Value, merge: int, count: int) -> ir.Value:
    """`[rows, columns, count]` of patches in the image processor's order, `[groups, patches of a group, count]`.

    Example:
        >>> write = Nodes()
        >>> values = write.constant(np.zeros((4, 6, 2), np.int64))  # 4 x 6 patches
        >>> _ = in_groups(write, values, merge=2, count=2)  # 6 groups of 4 patches
        >>> write.nodes[-1].op_type
        'Reshape'
    """
    down, across = (write("Div", write.size(values, axis), merge) for axis in (0, 1))
    parted = write.reshape(values, down, merge, across, merge, count)
    return write.reshape(write("Transpose", parted, perm=[0, 2, 1, 3, 4]), -1, merge**2, count)


def _row(number: int) -> tuple[np.ndarray, np.ndarray]:
    return np.array([number], np.int64), np.array([number + 1], np.int64)


def _places(write: Nodes, rows: ir.Value, columns: ir.Value) -> ir.Value:
    """Row and column of every place of a grid, int64 `[rows, columns, 2]`."""
    shape = write.joined(rows, columns, 1)
    row = write("Expand", write.spread(write.count(rows), 1, 2), shape)
    column = write("Expand", write.spread(write.count(columns), 0, 2), shape)
    return write("Concat", row, column, axis=2)


def _target_size(write: Nodes, image: ir.Value, processor: Any) -> tuple[ir.Value, ir.Value]:  # noqa: ANN401
    """Height and width after scaling, in float64 as transformers' `smart_resize`."""
    factor = processor.patch_size * processor.merge_size
    sides = [write.cast(write.size(image, axis), ir.DataType.DOUBLE) for axis in (0, 1)]
    near = [write("Mul", write("Round", write("Div", side, float(factor))), float(factor)) for side in sides]
    return bounded(write, sides, near, factor, (processor.size["shortest_edge"], processor.size["longest_edge"]))


def bounded(
    write: Nodes, sides: Sequence[ir.Value], near: Sequence[ir.Value], step: int, areas: tuple[int, int]
) -> tuple[ir.Value, ir.Value]:
    """Height and width of about a picture's shape, int64, whose pixels are within bounds.

    Args:
        write: Receives the nodes.
        sides: Height and width of the picture, float64.
        near: Those that are taken if they are within the bounds, float64.
        step: Of what other heights and widths are multiples.
        areas: Fewest and most pixels.

    Example:
        >>> write = Nodes()
        >>> sides, near = ([write.constant(size) for size in sizes] for sizes in ((480.0, 640.0), (476.0, 644.0)))
        >>> _ = bounded(write, sides, near, step=28, areas=(3136, 12845056))
        >>> [node.op_type for node in write.nodes].count("Sqrt")
        2
    """
    factor, (fewest, most) = float(step), map(float, areas)
    area = write("Mul", *sides)
    shrink = write("Sqrt", write("Div", area, most))
    grow = write("Sqrt", write("Div", fewest, area))
    reached = write("Mul", *near)
    too_large, too_small = write("Greater", reached, most), write("Less", reached, fewest)
    found = []
    for side, nearest in zip(sides, near, strict=True):
        down = write("Floor", write("Div", write("Div", side, shrink), factor))
        smaller = write("Max", write("Mul", down, factor), factor)
        larger = write("Mul", write("Ceil", write("Div", write("Mul", side, grow), factor)), factor)
        size = write("Where", too_large, smaller, write("Where", too_small, larger, nearest))
        found.append(write.cast(size, INT64))
    return found[0], found[1]


def window_nodes(write: Nodes, rows: ir.Value, columns: ir.Value, merge: int, side: int) -> dict[str, ir.Value]:
    """Qwen2.5-VL's `window_groups` and `group_places`, as `Qwen25VL.frame_feeds`; `side` is a window's, in groups.

    Example:
        >>> write = Nodes()
        >>> rows, columns = write.constant(8), write.constant(8)
        >>> list(window_nodes(write, rows, columns, merge=2, side=4))
        ['window_groups', 'group_places']
    """
    down, across = (write("Div", size, merge) for size in (rows, columns))
    whole = [write("Mul", write("Div", write("Add", size, side - 1), side), side) for size in (down, across)]
    count = write("Mul", down, across)
    beyond = write.joined(0, 0, write("Sub", whole[0], down), write("Sub", whole[1], across))
    groups = write("Pad", write.reshape(write.count(count), down, across), beyond, -1)
    parted = write.reshape(groups, -1, side, write("Div", whole[1], side), side)
    windows = write.reshape(write("Transpose", parted, perm=[0, 2, 1, 3]), -1, side**2)
    flat = write.reshape(windows, -1)
    places = write.reshape(write("NonZero", write("GreaterOrEqual", flat, 0)), -1)
    at_place = write("Gather", flat, places)
    # a permutation of all groups, whose inverse is wanted
    group_places = write("ScatterElements", write("Mul", places, 0), at_place, places)
    return {
        "window_groups": output(write("Max", windows, 0), INT64, "windows", side**2),
        "group_places": output(group_places, INT64, "groups"),
    }


def grid_nodes(write: Nodes, rows: ir.Value, columns: ir.Value, merge: int, side: int) -> dict[str, ir.Value]:
    """Qwen3-VL's `grid_points` and `grid_weights`, as `Qwen3VL.frame_feeds`; `side` is that of the learnt grid.

    Example:
        >>> write = Nodes()
        >>> rows, columns = write.constant(8), write.constant(8)
        >>> list(grid_nodes(write, rows, columns, merge=2, side=48))
        ['grid_points', 'grid_weights']
    """
    (row, row_weight), (column, column_weight) = (_between(write, size, side) for size in (rows, columns))
    along, across = (np.array(axes, np.int64) for axes in ([1, 3], [0, 2]))
    points = write("Add", write("Mul", write("Unsqueeze", row, along), side), write("Unsqueeze", column, across))
    weights = write("Mul", write("Unsqueeze", row_weight, along), write("Unsqueeze", column_weight, across))
    flat_points, flat_weights = (write.reshape(value, rows, columns, 4) for value in (points, weights))
    return {
        "grid_points": output(in_groups(write, flat_points, merge, 4), INT64, "groups", merge**2, 4),
        "grid_weights": output(in_groups(write, flat_weights, merge, 4), FLOAT, "groups", merge**2, 4),
    }


def _between(write: Nodes, size: ir.Value, side: int) -> tuple[ir.Value, ir.Value]:
    """For `size` patches the two neighbours among `side` points int64, and their weights float32: both `[size, 2]`."""
    steps = np.array(side - 1, np.float32)
    last = write.cast(write("Max", write("Sub", size, 1), 1), FLOAT)
    place = write("Div", write("Mul", write.cast(write.count(size), FLOAT), steps), last)
    below = write("Floor", place)
    neighbours = write("Add", write.spread(write.cast(below, INT64), 1), np.arange(2, dtype=np.int64))
    offset = write.spread(write("Sub", place, below), 1)
    distance = write("Abs", write("Sub", offset, np.arange(2, dtype=np.float32)))
    weight = write("Max", write("Sub", np.array(1, np.float32), distance), np.array(0, np.float32))
    return write("Min", write("Max", neighbours, 0), side - 1), weight
