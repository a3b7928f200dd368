"""How MiniCPM-V 4.6 cuts a picture into slices, as nodes of `preprocess.onnx` that compare whole numbers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir

from qe_edge.models.graph_nodes import Nodes

INT64, DOUBLE = ir.DataType.INT64, ir.DataType.DOUBLE


def slice_grid(write: Nodes, sides: Sequence[ir.Value], processor: Any) -> tuple[ir.Value, list[ir.Value]]:  # noqa: ANN401
    """Whether a picture is cut, and rows and columns of its slices, 1 where it is not.

    Args:
        write: Receives the nodes.
        sides: Height and width of the picture, int64.
        processor: A `MiniCPMV4_6ImageProcessorPil`.

    Example:
        >>> from qe_edge.models.image_processors import pil_image_processor
        >>> write = Nodes()
        >>> sides = [write.constant(480), write.constant(640)]
        >>> cut, grid = slice_grid(write, sides, pil_image_processor("minicpmv4_6")())
        >>> len(grid)
        2
    """
    most, area = processor.max_slice_nums, processor.scale_resolution**2
    if not processor.slice_mode or most < 2:
        return write.constant(np.array(False)), [write.constant(1), write.constant(1)]
    ratio = write("Div", write.cast(write("Mul", *sides), DOUBLE), float(area))
    multiple = write("Min", write.cast(write("Ceil", ratio), INT64), most)
    bounds, grids = grid_table(processor)
    square = [write("Mul", side, side) for side in sides]
    which = write("Max", write("Sub", multiple, 2), 0)
    # width over height against the root of a ratio of whole numbers
    above, below = (write("Gather", bounds[:, number], which) for number in (0, 1))
    one, other = write("Mul", square[1], below), write("Mul", square[0], above)
    place = write("Mul", write.cast(write("Greater", one, other), INT64), 2)
    place = write("Add", place, write.cast(write("Equal", one, other), INT64))
    chosen = write("Gather", write("Gather", grids, which), write("ReduceSum", place, keepdims=0))
    cut = write("Greater", multiple, 1)
    return cut, [write("Where", cut, write("Gather", chosen, axis), 1) for axis in (0, 1)]


def grid_table(processor: Any) -> tuple[np.ndarray, np.ndarray]:  # noqa: ANN401 - share no typed base
    """The image processor's grids of slices for every number that it aims at, from 2, and every shape of a picture.

    It compares logarithms. What it chooses changes where the square of width over height is a ratio of whole numbers;
    there, and between, it is asked itself.

    Returns:
        These ratios' numerators and denominators in order, int64 `[numbers, 2, ratios]`, filled up with 1 and 0; and
        rows and columns below, at and above each of them, int64 `[numbers, 2 * ratios + 1, 2]`.

    Example:
        >>> from qe_edge.models.image_processors import pil_image_processor
        >>> bounds, grids = grid_table(pil_image_processor("minicpmv4_6")(max_slice_nums=2))
        >>> bounds.tolist(), grids.tolist()  # 1 x 2 or 2 x 1 slices; a square has two rows
        ([[[1], [1]]], [[[2, 1], [2, 1], [1, 2]]])
    """
    most = processor.max_slice_nums

    def asked(multiple: int, height: float, width: float) -> list[int]:
        side = math.sqrt(height * width / (multiple - 0.5))
        found: list[int] = processor.get_sliced_grid((height, width), most, side)
        return found

    ratios, grids = [], []
    for multiple in range(2, most + 1):
        numbers = [n for n in (multiple - 1, multiple, multiple + 1) if 1 < n <= most]
        shapes = sorted({Fraction(n, rows * rows) for n in numbers for rows in range(1, n + 1) if n % rows == 0})
        found = [one * other for one, other in pairwise(shapes)]
        points = [math.sqrt(found[0]) / 2, *map(math.sqrt, found), math.sqrt(found[-1]) * 2]
        chosen = []
        for number, (low, high) in enumerate(pairwise(points)):
            chosen.append(asked(multiple, 1.0, math.sqrt(low * high)))
            if number < len(found):
                chosen.append(asked(multiple, *_exact(found[number])))
        ratios.append([(ratio.numerator, ratio.denominator) for ratio in found])
        grids.append(chosen)
    longest = max(map(len, ratios))
    bounds = np.array([row + [(1, 0)] * (longest - len(row)) for row in ratios], np.int64)
    table = np.array([row + [row[-1]] * (2 * longest + 1 - len(row)) for row in grids], np.int64)
    return np.ascontiguousarray(bounds.transpose(0, 2, 1)), table


def _exact(ratio: Fraction) -> tuple[int, float]:
    """Height and width of the shape whose square is a ratio; whole numbers if there are such."""
    down, across = math.isqrt(ratio.denominator), math.isqrt(ratio.numerator)
    if Fraction(across**2, down**2) == ratio:
        return down, across
    return 1, math.sqrt(ratio)  # no picture has it
