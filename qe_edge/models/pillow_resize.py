"""Pillow's resize, and torch's, in standard ONNX operators, equal to the last bit.

ONNX Runtime's own Resize computes the filter's weights in float32 and differs from Pillow by 1 in some pixels of a
thousand. Here the weights are computed in float64 and rounded to 22 bits as in Pillow's `Resample.c`; their products
with pixels are whole numbers below 2^53, so a product of float64 matrices is exact. Rows are scaled first, then
columns, with pixels of 8 bits between; since Pillow 13 it is the other way where the height loses more than twice as
many pixels as the width. A filter reads a few neighbours only: outputs come in blocks, and each block multiplies the
stretch of the input that it reads. One block is in memory at a time. torch has the same filters; what it does in
another way says `qe_edge.models.torch_resize`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import PIL

from qe_edge.models.graph_nodes import OPSET, Nodes, Operand

BLOCK = 16  # outputs computed together
BITS = 22  # of a weight, as Pillow's PRECISION_BITS
COLUMNS_MAY_COME_FIRST = int(PIL.__version__.split(".")[0]) >= 13  # of the Pillow that the graph shall equal
LANCZOS, BILINEAR, BICUBIC = 1, 2, 3  # Pillow's numbers of filters

Filter = Callable[[Nodes, ir.Value], ir.Value]
Unit = Callable[[Nodes, ir.Value], ir.Value]


def resize(write: Nodes, image: ir.Value, height: Operand, width: Operand, resample: int) -> ir.Value:
    """Scale a picture as `PIL.Image.Image.resize` does.

    Args:
        write: Receives the nodes.
        image: uint8 `[height, width, 3]`.
        height: New height, an int64 scalar.
        width: New width.
        resample: A key of `FILTERS`.

    Returns:
        uint8 `[height, width, 3]`.

    Example:
        >>> write = Nodes()
        >>> image = ir.Value(name="image", type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape([480, 640, 3]))
        >>> _ = resize(write, image, height=448, width=448, resample=BICUBIC)
        >>> [node.op_type for node in write.nodes].count("Scan")  # the two passes of Pillow
        2
    """
    old_height, old_width = write.size(image, 0), write.size(image, 1)
    lost, narrowed = write("Sub", old_height, height), write("Sub", old_width, width)
    most = write("Max", write("Mul", narrowed, 2), 0)
    columns_first = write("Greater", lost, most) if COLUMNS_MAY_COME_FIRST else write.constant(np.array(False))
    # `lines` are what the first pass scales: columns of pixels, or rows
    lines = _turned_if(write, columns_first, image, turned=False)
    first = write("Where", columns_first, height, width)
    second = write("Where", columns_first, width, height)
    return _turned_if(write, columns_first, _scaled_twice(write, lines, first, second, resample, _pillows_unit))


def resize_as_torch(write: Nodes, image: ir.Value, height: Operand, width: Operand, resample: int) -> ir.Value:
    """Scale a picture as torch does with antialiasing, and as `qe_edge.models.torch_resize.scale_frames`.

    Arguments and result are those of `resize`.

    Example:
        >>> write = Nodes()
        >>> image = ir.Value(name="image", type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape([480, 640, 3]))
        >>> _ = resize_as_torch(write, image, height=448, width=448, resample=BILINEAR)
        >>> [node.op_type for node in write.nodes].count("Scan"), "If" in [node.op_type for node in write.nodes]
        (2, False)
    """
    lines = write("Transpose", image, perm=[1, 0, 2])  # the width is always scaled first
    return _scaled_twice(write, lines, width, height, resample, _torchs_unit)


def _scaled_twice(
    write: Nodes, lines: ir.Value, first: Operand, second: Operand, resample: int, unit: Unit
) -> ir.Value:
    """uint8 `[n, m, 3]` as `[second, first, 3]`: the axis of n is scaled to `first`, then that of m to `second`."""
    across = write.size(lines, 1)
    flat = write.reshape(lines, write.size(lines, 0), -1)
    once = write.reshape(_scaled(write, flat, first, resample, unit), first, across, 3)
    lines = write.reshape(write("Transpose", once, perm=[1, 0, 2]), across, -1)
    return write.reshape(_scaled(write, lines, second, resample, unit), second, first, 3)


def _turned_if(write: Nodes, condition: ir.Value, image: ir.Value, *, turned: bool = True) -> ir.Value:
    """The picture with rows and columns exchanged if a condition holds, or if it does not."""
    branches = []
    for exchange in (turned, not turned):
        inner = write.inside()
        output = inner("Transpose", image, perm=[1, 0, 2]) if exchange else inner("Identity", image)
        output.type = ir.TensorType(ir.DataType.UINT8)
        name = "exchanged" if exchange else "kept"
        branches.append(ir.Graph([], [output], nodes=inner.nodes, opset_imports={"": OPSET}, name=name))
    return write("If", condition, then_branch=branches[0], else_branch=branches[1])


def _scaled(write: Nodes, lines: ir.Value, size: Operand, resample: int, unit_of: Unit) -> ir.Value:
    """uint8 `[lines, n]` as `[size, n]`: every output line is a weighted sum of neighbouring lines."""
    starts, shares = _block_shares(write, write.size(lines, 0), size, FILTERS[resample])
    unit = unit_of(write, shares)
    scaled = write("Mul", shares, unit)
    # half away from zero
    weights = write("Mul", write("Sign", scaled), write("Floor", write("Add", write("Abs", scaled), 0.5)))
    half = write("Mul", unit, 0.5)
    inner = write.inside()
    start = ir.Value(name=f"{starts.name}.one", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    block = ir.Value(name=f"{weights.name}.one", type=ir.TensorType(ir.DataType.DOUBLE), shape=ir.Shape([BLOCK, None]))
    last = inner("Sub", inner.size(lines, 0), 1)
    places = inner("Min", inner("Add", start, inner.count(inner.size(block, 1))), last)
    pixels = inner.cast(inner("Gather", lines, places, axis=0), ir.DataType.DOUBLE)
    rounded = inner("Floor", inner("Div", inner("Add", inner("MatMul", block, pixels), half), unit))
    output = inner.cast(inner("Clip", rounded, 0.0, 255.0), ir.DataType.UINT8)
    output.type = ir.TensorType(ir.DataType.UINT8)
    body = ir.Graph([start, block], [output], nodes=inner.nodes, opset_imports={"": OPSET}, name="block")
    blocks = write("Scan", starts, weights, body=body, num_scan_inputs=2)
    return write("Slice", write.reshape(blocks, -1, write.size(lines, 1)), write.joined(0), write.joined(size))


def _pillows_unit(write: Nodes, shares: ir.Value) -> ir.Value:  # noqa: ARG001 - of any weights
    """What a weight of 1 is rounded as, a float64 scalar."""
    return write.constant(float(1 << BITS))


def _torchs_unit(write: Nodes, shares: ir.Value) -> ir.Value:
    """The largest power of two at which all weights fit into 16 bits."""
    powers = 2.0 ** np.arange(BITS + 1)
    rounded = write("Floor", write("Add", write("Mul", write("ReduceMax", shares, keepdims=0), powers), 0.5))
    fitting = write.cast(write("Less", rounded, float(1 << 15)), ir.DataType.INT64)
    # of 2 and more as many as fit; 1 is the last resort
    count = write("ReduceSum", write("Slice", fitting, write.joined(1), write.joined(BITS + 1)), keepdims=0)
    return write("Gather", powers, count)


def _block_shares(write: Nodes, old: ir.Value, new: Operand, kind: Kernel) -> tuple[ir.Value, ir.Value]:
    """Where the input of every block starts, int64 `[blocks]`, and float64 weights `[blocks, BLOCK, stretch]`.

    `precompute_coeffs` and `normalize_coeffs_8bpc` of Pillow's Resample.c, in the same order of float64 operations.
    """
    real = ir.DataType.DOUBLE
    scale = write("Div", write.cast(old, real), write.cast(new, real))
    stretch = write("Max", scale, 1.0)
    support = write("Mul", kind.support, stretch)
    blocks = write("Div", write("Add", new, BLOCK - 1), BLOCK)
    output = write("Min", write.count(write("Mul", blocks, BLOCK)), write("Sub", new, 1))
    center = write("Mul", write("Add", write.cast(output, real), 0.5), scale)
    first = write("Max", write.cast(write("Add", write("Sub", center, support), 0.5), ir.DataType.INT64), 0)
    end = write("Min", write.cast(write("Add", write("Add", center, support), 0.5), ir.DataType.INT64), old)
    first, end, center = (write.reshape(value, -1, BLOCK) for value in (first, end, center))
    starts = write("ReduceMin", first, np.array([1], np.int64), keepdims=1)
    length = write("ReduceMax", write("Sub", end, starts), keepdims=0)
    place = write.spread(write("Add", starts, write.count(length)), 1)  # [blocks, 1, stretch]
    first, end, center = (write.spread(value, 2) for value in (first, end, center))
    used = write("And", write("GreaterOrEqual", place, first), write("Less", place, end))
    distance = write("Add", write("Sub", write.cast(place, real), center), 0.5)
    raw = kind.weight(write, write("Abs", write("Mul", distance, write("Div", 1.0, stretch))))
    raw = write("Where", used, raw, 0.0)
    shares = write("Div", raw, write("ReduceSum", raw, np.array([2], np.int64), keepdims=1))
    return write("Squeeze", starts, np.array([1], np.int64)), shares


def _bilinear(write: Nodes, x: ir.Value) -> ir.Value:
    return write("Where", write("Less", x, 1.0), write("Sub", 1.0, x), 0.0)


def _bicubic(write: Nodes, x: ir.Value) -> ir.Value:
    """Keys' cubic with a = -0.5, of absolute distances."""
    near = write("Sub", write("Mul", 1.5, x), 2.5)
    near = write("Add", write("Mul", write("Mul", near, x), x), 1.0)
    far = write("Add", write("Mul", write("Sub", x, 5.0), x), 8.0)
    far = write("Mul", write("Sub", write("Mul", far, x), 4.0), -0.5)
    return write("Where", write("Less", x, 1.0), near, write("Where", write("Less", x, 2.0), far, 0.0))


def _lanczos(write: Nodes, x: ir.Value) -> ir.Value:
    value = write("Mul", _sinc(write, x), _sinc(write, write("Div", x, 3.0)))
    return write("Where", write("Less", x, 3.0), value, 0.0)


def _sinc(write: Nodes, x: ir.Value) -> ir.Value:
    angle = write("Mul", x, float(np.pi))
    zero = write("Equal", x, 0.0)
    return write("Where", zero, 1.0, write("Div", write("Sin", angle), write("Where", zero, 1.0, angle)))


@dataclass(frozen=True)
class Kernel:
    """A filter of Pillow.

    Attributes:
        support: Its reach in pixels of the smaller picture.
        weight: The nodes of its weight at absolute distances, float64.
    """

    support: float
    weight: Filter


FILTERS = {LANCZOS: Kernel(3.0, _lanczos), BILINEAR: Kernel(1.0, _bilinear), BICUBIC: Kernel(2.0, _bicubic)}
