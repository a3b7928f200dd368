"""The body of `com.microsoft::MultiHeadAttention` in standard operators, for runtimes without a kernel of that name.

ONNX Runtime computes the node itself and never reads the function. Lowerings for other targets put the body in the
node's place.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from qe_edge.export.op import OPSET, constant, real_constant, reference
from qe_edge.models.picture_attention import DOMAIN, NAME, VERSION

INPUTS = ("query", "key", "value")


def attach_attention(model: ir.Model) -> None:
    """Give a traced graph that has such nodes the function that defines them.

    Example:
        >>> head = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]> g (float[1, 5, 8] x) => (float y)'
        >>> node = "{ y = com.microsoft.MultiHeadAttention <num_heads: int = 2, scale: float = 0.5> (x, x, x) }"
        >>> model = ir.from_onnx_text(head + node)
        >>> attach_attention(model)
        >>> list(model.functions)
        [('com.microsoft', 'MultiHeadAttention', '')]
    """
    if not _nodes(model):
        return
    function = _function()
    model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = VERSION


def expand_attention(model: ir.Model) -> None:
    """Replace every such node by its body, in place, and drop the function.

    Example:
        >>> head = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]> g (float[1, 5, 8] x) => (float y)'
        >>> node = "{ y = com.microsoft.MultiHeadAttention <num_heads: int = 2, scale: float = 0.5> (x, x, x) }"
        >>> model = ir.from_onnx_text(head + node)
        >>> expand_attention(model)
        >>> [each.op_type for each in model.graph if each.op_type in ("MatMul", "Softmax")]
        ['MatMul', 'Softmax', 'MatMul']
    """
    for node in _nodes(model):
        ops = tape.Tape()
        query, key, value = (_given(operand, node) for operand in node.inputs[:3])
        heads = constant(ops, np.array([0, 0, node.attributes["num_heads"].as_int(), -1], np.int64))
        y = _body(ops, (query, key, value), heads, real_constant(ops, node.attributes["scale"].as_float()))
        for number, inner in enumerate(ops.nodes):
            inner.name = f"{node.name}/{inner.op_type}_{number}"
            inner.outputs[0].name = f"{inner.name}.output"
        output = node.outputs[0]
        y.type, y.shape = output.type, output.shape
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], ops.nodes, [output], [y])
    model.functions.pop((DOMAIN, NAME, ""), None)
    model.opset_imports.pop(DOMAIN, None)


def _nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, NAME)]


def _function() -> ir.Function:
    """For any number of heads and any scale, which are the node's attributes."""
    values = tuple(ir.Value(name=name) for name in INPUTS)
    ops = tape.Tape()
    count = ops.op("Constant", [], {"value_int": reference("value_int", "num_heads")})
    kept, rest, first = (constant(ops, np.array(sizes, np.int64)) for sizes in ([0, 0], [-1], [0]))
    heads = ops.op("Concat", [kept, ops.op("Unsqueeze", [count, first]), rest], {"axis": 0})
    scale = ops.op("Constant", [], {"value_float": ir.RefAttr("value_float", "scale", ir.AttributeType.FLOAT)})
    y = _body(ops, values, heads, scale)
    y.name = "y"
    graph = ir.Graph(list(values), [y], nodes=ops.nodes, opset_imports={"": OPSET}, name=NAME)
    declared = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in ("num_heads", "scale")]
    return ir.Function(DOMAIN, NAME, graph=graph, attributes=declared)


def _body(ops: tape.Tape, inputs: tuple[ir.Value, ...], heads: ir.Value, scale: ir.Value) -> ir.Value:
    """`[batch, tokens, heads * head_dim]` of inputs of that shape.

    Args:
        ops: Receives the nodes.
        inputs: Query, key and value.
        heads: int64 `[0, 0, heads, -1]`, the shape that parts the heads.
        scale: Factor on the scores, a scalar.
    """
    parted = [ops.op("Reshape", [value, heads]) for value in inputs]
    query, value = (ops.op("Transpose", [part], {"perm": [0, 2, 1, 3]}) for part in (parted[0], parted[2]))
    key = ops.op("Transpose", [parted[1]], {"perm": [0, 2, 3, 1]})
    scores = ops.op("Mul", [ops.op("MatMul", [query, key]), scale])
    mixed = ops.op("MatMul", [ops.op("Softmax", [scores], {"axis": -1}), value])
    joined = constant(ops, np.array([0, 0, -1], np.int64))
    return ops.op("Reshape", [ops.op("Transpose", [mixed], {"perm": [0, 2, 1, 3]}), joined])


def _given(value: ir.Value | None, node: ir.Node) -> ir.Value:
    if value is None:
        raise ValueError(f"node {node.name} lacks an input")
    return value
