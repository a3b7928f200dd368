"""Checks every `QELinear` node of a canonical graph before a lowering relies on it.

`qe_edge.export.op` describes the operator; K inputs, N outputs, g group size, r total rank.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from qe_edge.export.op import DOMAIN, INPUTS, NAME, Attributes
from qe_edge.models.texts import shortened
from qe_edge.numerics.grids import PER_CHANNEL
from qe_edge.system.errors import ArtifactError

REMEDY = "Export the model again."
INT4, INT8 = ir.DataType.INT4, ir.DataType.INT8
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
FACTORS = (*FLOATS, INT8, INT4)
TYPES = {"qweight": (INT4,), "zeros": (INT4,), "down": FACTORS, "up": FACTORS}  # all others are FLOATS
LIMITS = {"weight_bits": (3, 4), "act_bits": (0, 8), "rank_shared": (0, 1 << 20), "rank_routed": (0, 1 << 20)}


def check_layers(model: ir.Model, path: Path) -> None:
    """Refuse a graph whose layers contradict themselves.

    Args:
        model: A canonical graph.
        path: Its file, for messages.

    Raises:
        ArtifactError: If a node lacks an attribute or an operand, one has another type or shape, or two nodes have one
            name.

    Example:
        >>> text = '<ir_version: 10, opset_import: ["": 21, "qe_edge": 1]> g (float[1, 2, 64] x) => (float[1, 2, 32] y)'
        >>> model = ir.from_onnx_text(text + "{ y = qe_edge.QELinear (x) }")
        >>> model.graph[0].name = "up"
        >>> check_layers(model, Path("language.onnx"))
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ArtifactError: Layer 'up' of 'language.onnx' is damaged: its attribute 'weight_bits'
        is missing or no whole number. Export the model again.
    """
    names: set[str] = set()
    for node in model.graph:
        if node.name and node.name in names:
            raise ArtifactError(f"Two nodes of '{path}' are called '{shortened(node.name)}'.", REMEDY)
        names.add(node.name or "")
        if (node.domain, node.op_type) == (DOMAIN, NAME):
            reason = _wrong_attribute(node) or _wrong_operand(node, Attributes.of(node))
            if reason:
                raise ArtifactError(
                    f"Layer '{shortened(node.name or '')}' of '{path}' is damaged: {shortened(reason)}.", REMEDY
                )


def _wrong_attribute(node: ir.Node) -> str | None:
    if not node.name:
        return "it has no name"
    for name in Attributes.__dataclass_fields__:
        attribute = node.attributes.get(name)
        if attribute is None or attribute.is_ref() or attribute.type != ir.AttributeType.INT:
            return f"its attribute '{name}' is missing or no whole number"
        smallest, largest = LIMITS.get(name, (-1, 1 << 20))
        if not smallest <= attribute.as_int() <= largest:
            return f"its attribute '{name}' is {attribute.as_int()}"
    return None


def _wrong_operand(node: ir.Node, attributes: Attributes) -> str | None:
    given = dict(zip(INPUTS, node.inputs, strict=False))
    if len(node.inputs) > len(INPUTS) or len(node.outputs) != 1 or any(given.get(name) is None for name in INPUTS[:3]):
        return "it has not the inputs and the output of its operator"
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in given.items():
        if name == "x" or value is None:
            continue
        tensor = value.const_value
        if tensor is None or tensor.dtype not in TYPES.get(name, FLOATS):
            return f"'{name}' is {'no initializer' if tensor is None else tensor.dtype.name}"
        shapes[name] = tuple(tensor.shape.numpy())
    return _wrong_shape(shapes, attributes) or _wrong_edges(node, *shapes["qweight"])


def _wrong_shape(shapes: dict[str, tuple[int, ...]], attributes: Attributes) -> str | None:
    if len(shapes["qweight"]) != 2 or 0 in shapes["qweight"]:
        return f"'qweight' has the shape {list(shapes['qweight'])}"
    width, height = shapes["qweight"]
    group = width if attributes.group_size == PER_CHANNEL else attributes.group_size
    if group < 1 or width % group:
        return f"{width} inputs are no multiple of its group size {attributes.group_size}"
    for name, wanted in _wanted_shapes(width, height, width // group, attributes).items():
        if name in shapes and shapes[name] != wanted:
            return f"'{name}' has the shape {list(shapes[name])} and should have {list(wanted)}"
    if ("down" in shapes) != ("up" in shapes) or ("router" in shapes and "down" not in shapes):
        return "it has only a part of its low-rank correction"
    return None


def _wanted_shapes(width: int, height: int, groups: int, attributes: Attributes) -> dict[str, tuple[int, ...]]:
    rank = attributes.rank_shared + attributes.num_experts * attributes.rank_routed
    return {
        "scales": (groups, height),
        "zeros": (groups, height),
        "inv_omega": (width,),
        "down": (width, rank),
        "up": (rank, height),
        "down_scale": (rank,),
        "up_scale": (height,),
        "router": (width, max(attributes.num_experts, 1)),
        "bias": (height,),
    }


def _wrong_edges(node: ir.Node, width: int, height: int) -> str | None:
    """Input and output `[B, S, width]` and `[B, S, height]`, as far as the graph says."""
    for value, size in ((node.inputs[0], width), (node.outputs[0], height)):
        shape = None if value is None else value.shape
        if shape is not None and (len(shape) != 3 or (isinstance(shape[-1], int) and shape[-1] != size)):
            return f"'{value.name if value else ''}' has the shape {shape} and should end in {size}"
    return None
