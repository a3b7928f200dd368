"""Replaces operators that older TensorRT versions do not read."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from qe_edge.export.lowering.passes import InPlacePass, PassResult, ensure
from qe_edge.export.op import real_constant


class ExpandGelu(InPlacePass):
    """Replaces `Gelu` by its definition. Requires nothing; ensures that there is none left.

    Example:
        >>> text = '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) { y = Gelu (x) }'
        >>> ExpandGelu()(ir.from_onnx_text(text)).modified
        True
    """

    def call(self, model: ir.Model) -> PassResult:
        """Expand all of them."""
        _expand(model)
        return PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """No `Gelu` is left."""
        ensure(all(node.op_type != "Gelu" for node in model.graph), "No Gelu is left.")


def expand_gelu(model: ir.Model) -> None:
    """Replace `Gelu` by its definition; TensorRT recognises the pattern where it has a kernel for it.

    Example:
        >>> text = '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) { y = Gelu (x) }'
        >>> model = ir.from_onnx_text(text)
        >>> expand_gelu(model)
        >>> [node.op_type for node in model.graph if node.op_type != "Constant"]
        ['Mul', 'Erf', 'Mul', 'Add', 'Mul']
    """
    ExpandGelu()(model)


def _expand(model: ir.Model) -> None:
    for node in [node for node in model.graph if node.op_type == "Gelu"]:
        x, approximate = node.inputs[0], node.attributes.get("approximate")
        if x is None:
            raise ValueError(f"node {node.name} has no input")
        ops = tape.Tape()
        if approximate is not None and approximate.as_string() == "tanh":
            cube = ops.op("Mul", [ops.op("Mul", [ops.op("Mul", [x, x]), x]), real_constant(ops, 0.044715)])
            curve = ops.op("Mul", [ops.op("Add", [x, cube]), real_constant(ops, math.sqrt(2 / math.pi))])
            sigmoid = ops.op("Tanh", [curve])
        else:
            sigmoid = ops.op("Erf", [ops.op("Mul", [x, real_constant(ops, math.sqrt(0.5))])])
        half = ops.op("Mul", [x, real_constant(ops, 0.5)])
        y = ops.op("Mul", [half, ops.op("Add", [sigmoid, real_constant(ops, 1.0)])])
        for number, inner in enumerate(ops.nodes):
            inner.name = f"{node.name}/{inner.op_type}_{number}"
            inner.outputs[0].name = f"{inner.name}.output"
            inner.outputs[0].type, inner.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), x.shape
        for inner in ops.nodes:
            if inner.op_type == "Constant":
                inner.outputs[0].shape = ir.Shape(np.shape(0.0))
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], ops.nodes, node.outputs, [y])
