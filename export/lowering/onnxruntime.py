"""The lowering for ONNX Runtime on a CPU: fewer and larger nodes, which compute what the canonical graph does.

A decoded token passes through every node, and most of them do less work than it costs to start them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from qe_edge.export.lowering.inline import InlineLayers
from qe_edge.export.lowering.passes import InPlacePass, PassResult
from qe_edge.export.lowering.rotary import FuseRotary
from qe_edge.export.lowering.siblings import join_siblings
from qe_edge.export.lowering.skip_norm import FuseSkipNorm
from qe_edge.export.lowering.stored_types import WidenWeights
from qe_edge.export.op import Attributes, Operands, constant, rank_table
from qe_edge.numerics.grids import PER_CHANNEL


def lower_for_onnxruntime(model: ir.Model) -> None:
    """Lower a canonical graph in place.

    Layers that read the same input become one, corrections of zeros are left out, a rotary embedding is one node, and
    additions are part of the norms that follow.

    Args:
        model: A canonical graph.

    Example:
        >>> import qe_edge, torch
        >>> from qe_edge.export.layers import layers_graph
        >>> layer = qe_edge.quantize_linear(torch.ones(32, 64), torch.ones(2, 64), qe_edge.make_recipe(method="rtn"))
        >>> model = layers_graph({"mlp.up": layer})
        >>> lower_for_onnxruntime(model)
        >>> [node.op_type for node in model.graph][-2:]
        ['DequantizeLinear', 'MatMul']
    """
    WidenWeights()(model)
    join_siblings(model)
    FuseRotary()(model)
    FuseSkipNorm()(model)
    _DropReshapes()(model)
    InlineLayers(_products)(model)


@dataclass(frozen=True)
class _Products:
    """Bodies of one layer for ONNX Runtime.

    Attributes:
        attributes: The node's attributes.
    """

    attributes: Attributes

    def main(self, ops: tape.Tape, x: ir.Value, operands: Operands) -> ir.Value:
        """DequantizeLinear and MatMul, which ONNX Runtime fuses to MatMulNBits where there are groups."""
        if self.attributes.group_size == PER_CHANNEL and operands.zeros is None:
            row = constant(ops, np.array([0], np.int64))
            scales = ops.op("Squeeze", [operands.scales, row])
            return ops.op("MatMul", [x, ops.op("DequantizeLinear", [operands.qweight, scales], {"axis": 1})])
        inputs = [operands.qweight, operands.scales, *([] if operands.zeros is None else [operands.zeros])]
        layout = {"axis": 0, "block_size": self.attributes.group_size}
        return ops.op("MatMul", [x, ops.op("DequantizeLinear", inputs, layout)])

    def factor(self, ops: tape.Tape, x: ir.Value, factor: ir.Value, scale: ir.Value | None) -> ir.Value:
        """Integer factors are scaled in float32, once, when the graph is loaded."""
        if scale is not None:
            factor = ops.op("Mul", [ops.op("Cast", [factor], {"to": ir.DataType.FLOAT.value}), scale])
        return ops.op("MatMul", [x, factor])

    def rank_table(self, ops: tape.Tape, down: ir.Value) -> ir.Value:  # noqa: ARG002 - the sizes are known
        """A constant."""
        return rank_table(ops, self.attributes)


def _products(
    _graph: ir.Graph, _node: ir.Node, operands: Operands, attributes: Attributes
) -> tuple[Operands, _Products]:
    """How ONNX Runtime multiplies a layer's weights, as `InlineLayers` asks for it."""
    return operands, _Products(attributes)


class _DropReshapes(InPlacePass):
    """Removes a `Reshape` to the shape that its input has."""

    def call(self, model: ir.Model) -> PassResult:
        """Remove all of them."""
        dropped = 0
        for node in list(model.graph):
            if (node.domain, node.op_type) == ("", "Reshape") and _keeps_shape(node):
                ir.convenience.replace_nodes_and_values(
                    model.graph,
                    node,
                    [node],
                    [],
                    node.outputs,
                    [node.inputs[0]],  # type: ignore[list-item] # a Reshape has its input
                )
                dropped += 1
        return PassResult(model, modified=bool(dropped))


def _keeps_shape(node: ir.Node) -> bool:
    """Whether input and output have the same known sizes; equal names are equal sizes."""
    x, y = node.inputs[0], node.outputs[0]
    if x is None or x.shape is None or y.shape is None or y.is_graph_output():
        return False
    known = all(isinstance(size, int) or size.value is not None for size in x.shape)
    return known and list(x.shape) == list(y.shape)
