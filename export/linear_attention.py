"""The body of `com.microsoft::LinearAttention`, as language graphs use it, in standard operators.

ONNX Runtime computes the node itself and never reads the function.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from qe_edge.export.op import OPSET, constant, reference
from qe_edge.models.linear_attention import DOMAIN, NAME, VERSION

INPUTS = ("query", "key", "value", "past_state", "decay", "beta")


def attach_linear_attention(model: ir.Model) -> None:
    """Give a traced graph that has such nodes the function that defines them.

    Example:
        >>> tokens = "float[1, 3, 8] q, float[1, 3, 8] k, float[1, 3, 8] v, float[1, 2, 4, 4] s"
        >>> gates, numbers = "float[1, 3, 2] g, float[1, 3, 2] b", "q_num_heads: int = 2, kv_num_heads: int = 2"
        >>> node = f'y, n = com.microsoft.LinearAttention <{numbers}, scale: float = 0.5> (q, k, v, s, g, b)'
        >>> head = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>'
        >>> model = ir.from_onnx_text(f"{head} g ({tokens}, {gates}) => (float y, float n) {{ {node} }}")
        >>> attach_linear_attention(model)
        >>> list(model.functions)
        [('com.microsoft', 'LinearAttention', '')]
    """
    if any((node.domain, node.op_type) == (DOMAIN, NAME) for node in model.graph):
        function = _function()
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = VERSION


def _function() -> ir.Function:
    """For any number of heads and any scale, which are the node's attributes."""
    query, key, value, past, decay, beta = values = [ir.Value(name=name) for name in INPUTS]
    ops = tape.Tape()
    first, kept, rest = (constant(ops, np.array(sizes, np.int64)) for sizes in ([0], [0, 0], [-1]))
    count = ops.op("Constant", [], {"value_int": reference("value_int", "kv_num_heads")})
    split = ops.op("Concat", [kept, ops.op("Unsqueeze", [count, first]), rest], {"axis": 0})
    scale = ops.op("Constant", [], {"value_float": ir.RefAttr("value_float", "scale", ir.AttributeType.FLOAT)})
    by_token = [
        ops.op("Transpose", [ops.op("Reshape", [part, split])], {"perm": [1, 0, 2, 3]})
        for part in (ops.op("Mul", [query, scale]), key, value)
    ]
    gates = [ops.op("Transpose", [part], {"perm": [1, 0, 2]}) for part in (decay, beta)]
    scanned = ir.Node("", "Scan", [past, *by_token, *gates], [], num_outputs=2)
    scanned.attributes["body"] = ir.AttrGraph("body", _step())
    scanned.attributes["num_scan_inputs"] = ir.AttrInt64("num_scan_inputs", 5)
    present, mixed = scanned.outputs
    last = tape.Tape()
    joined = constant(last, np.array([0, 0, -1], np.int64))
    output = last.op("Reshape", [last.op("Transpose", [mixed], {"perm": [1, 0, 2, 3]}), joined])
    output.name, present.name = "output", "present_state"
    graph = ir.Graph(
        values, [output, present], nodes=[*ops.nodes, scanned, *last.nodes], opset_imports={"": OPSET}, name=NAME
    )
    declared = [
        ir.Attr(name, ir.AttributeType.UNDEFINED, None)
        for name in ("q_num_heads", "kv_num_heads", "update_rule", "scale")
    ]
    return ir.Function(DOMAIN, NAME, graph=graph, attributes=declared)


def _step() -> ir.Graph:
    """One token: matrices `[batch, heads, key width, value width]`, then `[batch, heads, width]` and its gates."""
    names = ("state", "query", "key", "value", "decay", "beta")
    state, query, key, value, decay, beta = given = [
        ir.Value(name=f"{name}_now", type=ir.TensorType(ir.DataType.FLOAT)) for name in names
    ]
    ops = tape.Tape()
    row, column, both = (constant(ops, np.array(axes, np.int64)) for axes in ([2], [3], [2, 3]))
    decayed = ops.op("Mul", [state, ops.op("Unsqueeze", [ops.op("Exp", [decay]), both])])
    known = ops.op("MatMul", [ops.op("Unsqueeze", [key, row]), decayed])
    missing = ops.op("Sub", [ops.op("Unsqueeze", [value, row]), known])
    surprise = ops.op("Mul", [missing, ops.op("Unsqueeze", [beta, both])])
    after = ops.op("Add", [decayed, ops.op("MatMul", [ops.op("Unsqueeze", [key, column]), surprise])])
    mixed = ops.op("Squeeze", [ops.op("MatMul", [ops.op("Unsqueeze", [query, row]), after]), row])
    for number, node in enumerate(ops.nodes):
        node.outputs[0].name = f"token.{number}"  # another one than any around the body
    for result in (after, mixed):
        result.type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Graph(given, [after, mixed], nodes=ops.nodes, opset_imports={"": OPSET}, name="token")
