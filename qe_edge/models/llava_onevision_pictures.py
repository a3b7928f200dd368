"""`preprocess.onnx` of LLaVA-OneVision: an overview and tiles of the only picture of a prompt, or one tile of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from qe_edge.models.anyres import LARGER, NEIGHBOURS
from qe_edge.models.graph_nodes import Nodes
from qe_edge.models.picture_graphs import (
    PictureGraph,
    counted,
    finished,
    output,
    picture_input,
    pictures_input,
)
from qe_edge.models.pillow_resize import FILTERS, resize
from qe_edge.models.tile_pictures import cut, pixel_values, repeated

INT64, FLOAT, DOUBLE = ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.DOUBLE


def picture_graph(processor: Any, image_token: int, side: int, most: int) -> PictureGraph | None:  # noqa: ANN401
    """The graph of a model; None if its image processor does what no graph here does.

    Args:
        processor: A `LlavaOnevisionImageProcessorPil`.
        image_token: The token of a feature, and the one that stands for a picture.
        side: Patches per side of a tile.
        most: A picture of more patches than this number of tiles has is scaled down.

    Example:
        >>> from qe_edge.models.image_processors import pil_image_processor
        >>> graph = picture_graph(pil_image_processor("llava_onevision")(), image_token=9, side=27, most=9)
        >>> list(graph.outputs)
        ['pixel_values', 'token_places', 'token_weights', 'placeholder_ids', 'placeholder_positions']
    """
    if not processor.do_resize or processor.do_center_crop or processor.resample not in FILTERS:
        return None
    write, image, pictures = Nodes(), picture_input(), pictures_input()
    tile = processor.size["height"], processor.size["width"]
    alone = write("Equal", pictures, 1)
    sides = [write.size(image, axis) for axis in (0, 1)]
    target = _resolution(write, sides, processor.image_grid_pinpoints)
    target = [write("Where", alone, size, least) for size, least in zip(target, tile, strict=True)]
    rows, columns = (write("Div", size, least) for size, least in zip(target, tile, strict=True))
    padded = _padded(write, image, sides, target, processor.resample)
    tiles = cut(write, padded, rows, columns, tile)
    tiles = write("Slice", tiles, write.joined(0), write.joined(write("Where", alone, write("Mul", rows, columns), 0)))
    whole = resize(write, _squared(write, image, sides, alone, processor), *tile, processor.resample)
    pixels = write("Concat", cut(write, whole, 1, 1, tile), tiles, axis=0)
    places, weights = _tokens(write, sides, (rows, columns), alone, side, most)
    feeds = {
        **pixel_values(write, pixels, processor, tile),
        "token_places": output(places, INT64, "tokens", "taps"),
        "token_weights": output(weights, FLOAT, "tokens", "taps"),
    }
    ids = repeated(write, image_token, write.size(places, 0))
    return replace(finished(write, image, feeds, counted(write, ids), image_token), further=(pictures,))


def _resolution(write: Nodes, sides: Sequence[ir.Value], resolutions: Sequence[Sequence[int]]) -> list[ir.Value]:
    """Height and width as transformers' `select_best_resolution`: most of the picture's pixels, then least waste."""
    table = np.array(resolutions, np.int64)
    real = [write.cast(side, DOUBLE) for side in sides]
    scales = [write("Div", table[:, axis].astype(np.float64), real[axis]) for axis in (0, 1)]
    scale = write("Min", *scales)
    reached = write("Mul", *(write.cast(write("Mul", side, scale), INT64) for side in real))
    used = write("Min", reached, write("Mul", *sides))
    largest = write("ReduceMax", used, keepdims=0)
    area = np.ascontiguousarray(table.prod(1))
    chosen = write("ArgMin", write("Where", write("Equal", used, largest), area, 1 << 62), axis=0, keepdims=0)
    return [write("Gather", np.ascontiguousarray(table[:, axis]), chosen) for axis in (0, 1)]


def _padded(
    write: Nodes, image: ir.Value, sides: Sequence[ir.Value], target: Sequence[ir.Value], resample: int
) -> ir.Value:
    """The picture in the middle of black, uint8 of height and width `target`."""
    scales = [
        write("Div", write.cast(size, DOUBLE), write.cast(side, DOUBLE))
        for size, side in zip(target, sides, strict=True)
    ]
    wide = write("Less", scales[1], scales[0])
    fitted = []
    for axis in (0, 1):
        product = write("Mul", write.cast(sides[axis], DOUBLE), scales[1 - axis])
        other = write("Min", write.cast(write("Ceil", product), INT64), target[axis])
        pair = (other, target[axis]) if axis == 0 else (target[axis], other)
        fitted.append(write("Where", wide, *pair))
    scaled = resize(write, image, fitted[0], fitted[1], resample)
    missing = [write("Sub", size, one) for size, one in zip(target, fitted, strict=True)]
    before = [write("Div", size, 2) for size in missing]
    after = [write("Sub", size, one) for size, one in zip(missing, before, strict=True)]
    return write("Pad", scaled, write.joined(*before, 0, *after, 0), np.array(0, np.uint8))


def _squared(
    write: Nodes,
    image: ir.Value,
    sides: Sequence[ir.Value],
    alone: ir.Value,
    processor: Any,  # noqa: ANN401 - share no typed base
) -> ir.Value:
    """The picture as it is where it is alone, else in the middle of a square of the mean color."""
    longest = write("Max", *sides)
    missing = [write("Where", alone, 0, write("Sub", longest, side)) for side in sides]
    before = [write("Div", size, 2) for size in missing]
    after = [write("Sub", size, one) for size, one in zip(missing, before, strict=True)]
    squared = write("Pad", image, write.joined(*before, 0, *after, 0), np.array(0, np.uint8))
    inside = []
    for axis in (0, 1):
        place = write("Sub", write.count(write("Add", sides[axis], missing[axis])), before[axis])
        inside.append(write("And", write("GreaterOrEqual", place, 0), write("Less", place, sides[axis])))
    both = write("And", write.spread(inside[0], 1, 2), write.spread(inside[1], 0, 2))
    color = np.array([int(mean * 255) for mean in processor.image_mean], np.uint8)
    return write("Where", both, squared, color)


def _tokens(
    write: Nodes,
    sides: Sequence[ir.Value],
    tiles: tuple[ir.Value, ir.Value],
    alone: ir.Value,
    side: int,
    most: int,
) -> tuple[ir.Value, ir.Value]:
    """Places int64 and weights float32 `[tokens, taps]`, as `qe_edge.models.anyres` has them."""
    grid = [write("Mul", count, side) for count in tiles]
    first = _margins(write, sides, grid)
    count = [write("Sub", size, write("Mul", margin, 2)) for size, margin in zip(grid, first, strict=True)]
    area = write.cast(write("Mul", *count), DOUBLE)
    ratio = write("Sqrt", write("Div", area, float(most * side**2)))
    scaled = write("And", alone, write("Greater", ratio, LARGER))
    safe = write("Where", scaled, ratio, 1.0)
    numbers, shares = [], []
    for axis, size in enumerate(count):
        real = write.cast(size, DOUBLE)  # Python's floor of a quotient, which is that of the exact one
        whole = write("Round", write("Div", write("Sub", real, write("Mod", real, safe, fmod=1)), safe))
        points = write("Where", alone, write.cast(whole, INT64), 0)
        place, share = _between(write, size, points)
        place = write("Add", place, first[axis])
        tile, inside = write("Div", place, side), write("Mod", place, side)
        steps = (write("Mul", tiles[1], side**2), side) if axis == 0 else (side**2, 1)
        numbers.append(write("Add", write("Mul", tile, steps[0]), write("Mul", inside, steps[1])))
        shares.append(share)
    along, across = (np.array(axes, np.int64) for axes in ([1, 3], [0, 2]))
    places = write("Add", write("Unsqueeze", numbers[0], along), write("Unsqueeze", numbers[1], across))
    weights = write("Mul", write("Unsqueeze", shares[0], along), write("Unsqueeze", shares[1], across))
    end = write.joined(0, 0, 0, 0, 1, 0)
    lines = [
        write("Pad", write.reshape(part, write.size(part, 0), write.size(part, 1), NEIGHBOURS), end)
        for part in (write("Add", places, side**2), weights)
    ]
    overview = np.zeros((side**2 + 1, NEIGHBOURS), np.int64)  # with the end of a line, which follows it beside others
    overview[:-1, 0] = np.arange(side**2)
    shown = np.zeros(overview.shape, np.float32)
    shown[:-1, 0] = 1
    taps, stop = write("Where", scaled, NEIGHBOURS, 1), write("Where", alone, side**2, side**2 + 1)
    found = []
    for head, line in zip((write.constant(overview), write.constant(shown)), lines, strict=True):
        begun = write("Slice", head, write.joined(0), write.joined(stop))
        every = write("Concat", begun, write.reshape(line, -1, NEIGHBOURS), axis=0)
        found.append(write("Slice", every, write.joined(0), write.joined(taps), write.joined(1)))
    return found[0], found[1]


def _margins(write: Nodes, sides: Sequence[ir.Value], grid: Sequence[ir.Value]) -> list[ir.Value]:
    """Rows and columns of patches above and left of the picture's; as many are below and right of them."""
    (height, width), (rows, columns) = sides, grid
    real = [write.cast(value, DOUBLE) for value in (width, height, columns, rows)]
    wide = write("Greater", write("Div", real[0], real[1]), write("Div", real[2], real[3]))
    top = write("Div", write("Sub", rows, write("Div", write("Mul", height, columns), width)), 2)
    left = write("Div", write("Sub", columns, write("Div", write("Mul", width, rows), height)), 2)
    return [write("Where", wide, top, 0), write("Where", wide, 0, left)]


def _between(write: Nodes, size: ir.Value, points: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Two neighbours int64 and their weights float32, both `[points, 2]`, rounded as in `qe_edge.models.anyres`."""
    one = np.array(1, np.float32)
    scale = write("Div", write.cast(size, FLOAT), write.cast(write("Max", points, 1), FLOAT))
    index = write("Add", write.cast(write.count(points), DOUBLE), 0.5)
    exact = write("Sub", write("Mul", index, write.cast(scale, DOUBLE)), 0.5)
    place = write("Max", write.cast(exact, FLOAT), np.array(0, np.float32))
    floor = write("Floor", place)
    below, share = write.cast(floor, INT64), write("Sub", place, floor)
    above = write("Min", write("Add", below, 1), write("Sub", size, 1))
    pairs = ((below, above), (write("Sub", one, share), share))
    both = [write("Concat", *(write.spread(value, 1) for value in pair), axis=1) for pair in pairs]
    return both[0], both[1]
