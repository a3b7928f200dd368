"""What a value was made of: how passes recognise the small nodes that a tracer leaves behind."""

from __future__ import annotations

import onnx_ir as ir


def maker(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes a value, if it is a standard operator of this type.

    Example:
        >>> head = '<ir_version: 10, opset_import: ["": 21]> g (float[4] x) => (float[4] y)'
        >>> y = ir.from_onnx_text(head + "{ y = Neg (x) }").graph.outputs[0]
        >>> maker(y, "Neg") is y.producer(), maker(y, "Abs")
        (True, None)
    """
    node = None if value is None else value.producer()
    return node if node is not None and (node.domain, node.op_type) == ("", op_type) else None


def made_from(value: ir.Value | None, op_type: str, perm: list[int] | None = None) -> ir.Value | None:
    """The first input of the node that makes a value, if it is a standard operator of this type, and permutes so.

    Example:
        >>> head = '<ir_version: 10, opset_import: ["": 21]> g (float[2, 4] x) => (float[4, 2] y)'
        >>> y = ir.from_onnx_text(head + "{ y = Transpose <perm = [1, 0]> (x) }").graph.outputs[0]
        >>> made_from(y, "Transpose", [1, 0]).name, made_from(y, "Transpose", [0, 1])
        ('x', None)
    """
    node = maker(value, op_type)
    if node is None or (perm is not None and list(node.attributes["perm"].as_ints()) != perm):
        return None
    return node.inputs[0]


def number_of(value: ir.Value | None) -> float | None:
    """The number in an initializer of one element.

    Example:
        >>> import numpy as np
        >>> from qe_edge.export.lowering.inline import add_initializer
        >>> axis = add_initializer(ir.Graph([], [], nodes=[]), "axis", np.array([-1]))
        >>> number_of(axis), number_of(ir.Value(name="x"))
        (-1.0, None)
    """
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return float(value.const_value.numpy().ravel()[0])
