"""RMS norms as runtimes know them: one kernel computes `x / sqrt(...)`, six nodes `x * (1 / sqrt(...))`.

torch writes the second for `rsqrt`. ONNX Runtime fuses the first to SimplifiedLayerNormalization.
"""

from __future__ import annotations

import onnx_ir as ir


def divide_by_roots(model: ir.Model) -> None:
    """Replace products with the reciprocal of a root by quotients, in place.

    Args:
        model: A traced graph.

    Example:
        >>> text = '<ir_version: 10, opset_import: ["": 21]> g (float[2] x, float[2] v) => (float[2] y)'
        >>> model = ir.from_onnx_text(text + "{ r = Sqrt (v)  i = Reciprocal (r)  y = Mul (x, i) }")
        >>> divide_by_roots(model)
        >>> [node.op_type for node in model.graph]
        ['Sqrt', 'Div']
    """
    for reciprocal in [node for node in model.graph if node.op_type == "Reciprocal"]:
        (root,) = reciprocal.inputs
        used = [node for node, _ in reciprocal.outputs[0].uses()]
        source = None if root is None else root.producer()
        if root is None or source is None or source.op_type != "Sqrt":
            continue
        if len(used) != 1 or used[0].op_type != "Mul" or reciprocal.outputs[0].is_graph_output():
            continue
        _divide(model.graph, reciprocal, root, used[0])


def _divide(graph: ir.Graph, reciprocal: ir.Node, root: ir.Value, product: ir.Node) -> None:
    others = [value for value in product.inputs if value is not reciprocal.outputs[0]]
    if len(others) != 1:  # the square of the reciprocal
        return
    quotient = ir.Node("", "Div", [others[0], root], num_outputs=1, name=product.name)
    quotient.outputs[0].name = product.outputs[0].name
    quotient.outputs[0].type, quotient.outputs[0].shape = product.outputs[0].type, product.outputs[0].shape
    ir.convenience.replace_nodes_and_values(graph, product, [product], [quotient], product.outputs, quotient.outputs)
    graph.remove(reciprocal, safe=True)
