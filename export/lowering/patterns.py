"""What a value was made of: how passes recognise the small nodes that a tracer leaves behind."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def maker(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes a value, if it is a standard operator of this type."""
    node = None if value is None else value.producer()
    return node if node is not None and (node.domain, node.op_type) == ("", op_type) else None


def made_from(value: ir.Value | None, op_type: str, perm: list[int] | None = None) -> ir.Value | None:
    """The first input of the node that makes a value, if it is a standard operator of this type, and permutes so."""
    node = maker(value, op_type)
    if node is None or (perm is not None and list(node.attributes["perm"].as_ints()) != perm):
        return None
    return node.inputs[0]


def small_array(value: ir.Value | None) -> np.ndarray | None:
    """An initializer of at most four elements, flat."""
    if value is None or value.const_value is None or value.const_value.size > 4:
        return None
    array: np.ndarray = value.const_value.numpy()
    return array.ravel()


def number_of(value: ir.Value | None) -> float | None:
    """An initializer of one element."""
    array = small_array(value)
    return float(array[0]) if array is not None and len(array) == 1 else None
