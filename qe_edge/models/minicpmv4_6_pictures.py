"""`preprocess.onnx` of MiniCPM-V 4.6: the whole of a picture is a run, and the slices of a large one are another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from qe_edge.models.graph_nodes import Nodes
from qe_edge.models.image_processors import MAX_PIXELS
from qe_edge.models.minicpmv4_6_grids import slice_grid
from qe_edge.models.minicpmv4_6_tokens import SliceTokens
from qe_edge.models.picture_graphs import (
    PictureGraph,
    counted,
    finished,
    none_if,
    normalized,
    output,
    picture_input,
    value_table,
)
from qe_edge.models.pillow_resize import FILTERS, resize

INT64, FLOAT, DOUBLE = ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.DOUBLE


def picture_graph(processor: Any, tokens: SliceTokens | None, steps: int) -> PictureGraph | None:  # noqa: ANN401
    """The graph; None if the image processor or the tokenizer does what it cannot.

    Args:
        processor: A `MiniCPMV4_6ImageProcessorPil`.
        tokens: Those around the features; None if the tokenizer writes others.
        steps: How often four neighbours become one.

    Example:
        >>> from qe_edge.models.image_processors import pil_image_processor
        >>> tokens = SliceTokens([1], [[2, 3], [4, 5, 3], [4, 3]], [[2], [4]], image=9, most=9)
        >>> [*picture_graph(pil_image_processor("minicpmv4_6")(), tokens, steps=2).outputs][:4]
        ['pixel_values', 'places', 'pixel_values.2', 'places.2']
    """
    if tokens is None or processor.resample not in FILTERS:
        return None
    write, image = Nodes(), picture_input()
    unit = processor.patch_size * 2**steps
    sides = [write.size(image, axis) for axis in (0, 1)]
    cut, grid = slice_grid(write, sides, processor)
    whole, part, refused = _sizes(write, sides, cut, grid, processor, unit)
    rows, columns = (write("Where", write("And", cut, write("Not", refused)), count, 0) for count in grid)
    parts = [write("Max", count, 1) for count in (rows, columns)]
    values = 3 * processor.patch_size**2
    ones = [write.constant(1), write.constant(1)]
    feeds = {}
    for end, size, places, count in (("", whole, ones, 1), (".2", part, parts, write("Mul", rows, columns))):
        full = [write("Mul", one, many) for one, many in zip(size, places, strict=True)]
        scaled = resize(write, image, full[0], full[1], processor.resample)
        images = _patches(write, scaled, size, places, processor, steps)
        images = write("Slice", images, write.joined(0), write.joined(count))
        feeds[f"pixel_values{end}"] = output(images, FLOAT, f"images{end}", f"patches{end}", values)
        shares = _places(write, size, processor.patch_size, steps)
        feeds[f"places{end}"] = output(shares, FLOAT, 1, f"patches{end}", 2)
    features = [write("Mul", *(write("Div", one, unit) for one in size)) for size in (whole, part)]
    ids = none_if(write, refused, tokens.nodes(write, (rows, columns), features))
    return replace(finished(write, image, feeds, counted(write, ids), tokens.image), label=tokens.label)


def _sizes(
    write: Nodes,
    sides: Sequence[ir.Value],
    cut: ir.Value,
    grid: Sequence[ir.Value],
    processor: Any,  # noqa: ANN401 - share no typed base
    unit: int,
) -> tuple[list[ir.Value], list[ir.Value], ir.Value]:
    """Height and width of the whole picture, and of a slice; and whether these are too many pixels."""
    resolution = processor.scale_resolution

    def scaled(height: ir.Value, width: ir.Value) -> list[ir.Value]:
        aspect = write("Div", width, height)
        high = write("Floor", write("Div", float(resolution), write("Sqrt", aspect)))
        wide = write("Floor", write("Mul", high, aspect))
        return [_near(write, size, float(unit)) for size in (high, wide)]

    real = [write.cast(side, DOUBLE) for side in sides]
    whole = scaled(*real)
    counts = [write.cast(count, DOUBLE) for count in grid]
    divided = [write("Round", write("Div", side, count)) for side, count in zip(real, counts, strict=True)]
    part = scaled(*(write("Max", side, 1.0) for side in divided))
    pixels = write("Where", cut, write("Mul", write("Mul", *part), write("Mul", *grid)), 0)
    refused = write("Greater", write("Add", write("Mul", *whole), pixels), MAX_PIXELS)
    whole = [write("Where", refused, unit, size) for size in whole]
    idle = write("Or", refused, write("Not", cut))
    return whole, [write("Where", idle, unit, size) for size in part], refused


def _near(write: Nodes, size: ir.Value, step: float) -> ir.Value:
    """The nearest multiple of a step, at least one step, int64."""
    return write.cast(write("Mul", write("Max", write("Round", write("Div", size, step)), 1.0), step), INT64)


def _patches(
    write: Nodes,
    pixels: ir.Value,
    size: Sequence[ir.Value],
    places: Sequence[ir.Value],
    processor: Any,  # noqa: ANN401 - share no typed base
    steps: int,
) -> ir.Value:
    """float32 `[images, patches, values]` of images of one size, row by row; those together that become one."""
    patch, twos = processor.patch_size, [2] * steps
    down, across = (write("Div", one, patch * 2**steps) for one in size)
    parted = write.reshape(pixels, places[0], down, *twos, patch, places[1], across, *twos, patch, 3)
    width = 3 + steps  # axes of a height; as many are a width's
    inner = [axis + start for axis in range(2, 2 + steps) for start in (0, width)]
    order = [0, width, 1, width + 1, *inner, 2 * width, width - 1, 2 * width - 1]
    patches = write.reshape(write("Transpose", parted, perm=order), -1, 3, patch, patch)
    values = normalized(write, patches, value_table(processor), channel=-3)
    return write.reshape(values, -1, write("Mul", write("Mul", down, across), 4**steps), 3 * patch**2)


def _places(write: Nodes, size: Sequence[ir.Value], patch: int, steps: int) -> ir.Value:
    """float32 `[1, patches, 2]`: where a patch begins, as shares of height and width, in the order of patches."""
    counts = [write("Div", one, patch) for one in size]
    shares = [write("Div", write.cast(write.count(count), FLOAT), write.cast(count, FLOAT)) for count in counts]
    shape = write.joined(*counts, 1)
    both = [
        write("Expand", write.spread(share, *axes), shape) for share, axes in zip(shares, ((1, 2), (0, 2)), strict=True)
    ]
    twos = [2] * steps
    down, across = (write("Div", count, 2**steps) for count in counts)
    parted = write.reshape(write("Concat", *both, axis=2), down, *twos, across, *twos, 2)
    inner = [axis + start for axis in range(1, 1 + steps) for start in (0, 1 + steps)]
    order = [0, 1 + steps, *inner, 2 + 2 * steps]
    return write.reshape(write("Transpose", parted, perm=order), 1, -1, 2)
