"""Joins layers that read the same input, such as q/k/v and gate/up, so that they are launched as one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from qe_edge.export.lowering.inline import add_initializer, add_when_written, array_of, operands_of, shape_of
from qe_edge.export.lowering.passes import (
    InPlacePass,
    PassResult,
    ensure,
    linear_nodes,
    remove_unused,
    require_canonical,
)
from qe_edge.export.op import DOMAIN, INPUTS, NAME, VERSION, Attributes

JOINED = {"qweight": 1, "scales": 1, "zeros": 1, "up": 1, "up_scale": 0, "bias": 0}  # and the axis of their outputs


class JoinSiblings(InPlacePass):
    """Joins layers that read the same input. Requires a canonical graph; ensures that no two layers can be joined.

    Example:
        >>> text = '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) { y = Abs (x) }'
        >>> JoinSiblings()(ir.from_onnx_text(text)).modified  # there are no layers
        False
    """

    def requires(self, model: ir.Model) -> None:
        """Operands of layers are initializers."""
        require_canonical(model)

    def call(self, model: ir.Model) -> PassResult:
        """Join all of them."""
        found = list(_siblings(model))
        for siblings in found:
            _join(model.graph, siblings)
        remove_unused(model)
        return PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """No two layers can be joined."""
        ensure(not list(_siblings(model)), "No two layers read the same input and share their operands.")


def join_siblings(model: ir.Model) -> None:
    """Replace `QELinear` nodes that differ only in their outputs by one node and a Split, in place.

    Example:
        >>> import qe_edge, torch
        >>> from qe_edge.export.layers import attach_layers
        >>> layer = qe_edge.quantize_linear(torch.ones(32, 64), torch.ones(2, 64), qe_edge.make_recipe(method="rtn"))
        >>> head = '<ir_version: 10, opset_import: ["": 21, "qe_edge": 1]> g (float[1, 2, 64] x)'
        >>> nodes = [f'{name} = qe_edge.QELinear <layer: string = "mlp.{name}"> (x)' for name in ("gate", "up")]
        >>> model = ir.from_onnx_text(f"{head} => (float[1, 2, 32] gate, float[1, 2, 32] up) {{ {' '.join(nodes)} }}")
        >>> attach_layers(model, {"mlp.gate": layer, "mlp.up": layer})
        >>> join_siblings(model)
        >>> [(node.op_type, node.name) for node in model.graph]
        [('QELinear', 'mlp.gate+up'), ('Split', 'mlp.gate+up/Split')]
    """
    JoinSiblings()(model)


def _siblings(model: ir.Model) -> Iterator[list[ir.Node]]:
    """Groups of at least two nodes with the same input, attributes and shared operands, in graph order."""
    groups: dict[tuple[object, ...], list[ir.Node]] = {}
    for node in linear_nodes(model):
        groups.setdefault(_key(node), []).append(node)
    yield from (nodes for nodes in groups.values() if len(nodes) > 1)


def _key(node: ir.Node) -> tuple[object, ...]:
    """A key that siblings share; arrays by a hash of their content, because every node has its own neutral arrays."""
    operands = operands_of(node)
    shared = (getattr(operands, name) for name in INPUTS[1:] if name not in JOINED)
    contents = (None if value is None else hashlib.sha256(array_of(value).tobytes()).digest() for value in shared)
    groups = shape_of(operands.scales)[0]
    return operands.x, Attributes.of(node), operands.present(), groups, *contents


def _concatenated(graph: ir.Graph, name: str, values: Sequence[ir.Value], axis: int) -> ir.Value:
    """One initializer of several, along an axis."""
    shape = list(shape_of(values[0]))
    shape[axis] = sum(shape_of(value)[axis] for value in values)
    kind = values[0].dtype
    if kind is None:
        raise ValueError(f"value '{values[0].name}' has no type")
    return add_when_written(graph, name, lambda: np.concatenate([array_of(one) for one in values], axis), kind, shape)


def _join(graph: ir.Graph, siblings: list[ir.Node]) -> None:
    first = siblings[0]
    name = "+".join([first.name or "", *((node.name or "").rpartition(".")[2] for node in siblings[1:])])
    operands = [operands_of(node) for node in siblings]
    inputs: list[ir.Value | None] = []
    for key in INPUTS[: len(first.inputs)]:
        values = [getattr(each, key) for each in operands]
        if key in JOINED and values[0] is not None:
            inputs.append(_concatenated(graph, f"{name}.{key}", values, JOINED[key]))
        else:
            inputs.append(values[0])
    joined = ir.node(NAME, inputs, Attributes.of(first).onnx(), domain=DOMAIN, version=VERSION, name=name)
    sizes = np.array([shape_of(each.qweight)[1] for each in operands], np.int64)
    y, outputs = joined.outputs[0], [node.outputs[0] for node in siblings]
    y.name, y.type = f"{name}.output", outputs[0].type
    if outputs[0].shape is not None:
        y.shape = ir.Shape([*outputs[0].shape[:-1], int(sizes.sum())])
    lengths = add_initializer(graph, f"{name}.sizes", sizes)
    parts = [ir.Value(type=output.type, shape=output.shape) for output in outputs]
    split = ir.node("Split", [y, lengths], {"axis": -1}, outputs=parts, name=f"{name}/Split")
    graph.insert_before(first, [joined, split])
    for node, output, part in zip(siblings, outputs, parts, strict=True):
        ir.convenience.replace_nodes_and_values(graph, node, [node], [], [output], [part])
