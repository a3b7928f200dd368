"""Base of our passes over a graph: each states and checks its precondition and its postcondition.

A contract that breaks is a mistake of ours, not of the user's; its error names the pass and the condition.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qe_edge.export.op import DOMAIN, NAME

__all__ = [
    "InPlacePass",
    "PassResult",
    "ensure",
    "linear_nodes",
    "remove_unused",
    "require",
    "require_canonical",
    "untyped_values",
]


def linear_nodes(model: ir.Model) -> list[ir.Node]:
    """The `QELinear` nodes of a graph, in its order: canonical ones, or the plugin's.

    Example:
        >>> text = '<ir_version: 10, opset_import: ["": 21, "qe_edge": 1]> g (float[1, 2, 64] x) => (float[1, 2, 32] y)'
        >>> model = ir.from_onnx_text(text + "{ a = Abs (x)  y = qe_edge.QELinear (a) }")
        >>> [node.op_type for node in linear_nodes(model)]
        ['QELinear']
    """
    return [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, NAME)]


def require(holds: bool, condition: str) -> None:
    """Refuse a graph that a pass cannot take.

    Raises:
        PreconditionError: If the condition does not hold.

    Example:
        >>> require(True, "Results have types.")
        >>> require(False, "Results have types.")
        Traceback (most recent call last):
            ...
        onnx_ir.passes.PreconditionError: Results have types.
    """
    if not holds:
        raise PreconditionError(condition)


def ensure(holds: bool, condition: str) -> None:
    """Refuse to hand on a graph that breaks the promise of a pass.

    Raises:
        PostconditionError: If the condition does not hold.

    Example:
        >>> ensure(False, "No Gelu is left.")
        Traceback (most recent call last):
            ...
        onnx_ir.passes.PostconditionError: No Gelu is left.
    """
    if not holds:
        raise PostconditionError(condition)


def require_canonical(model: ir.Model) -> None:
    """Refuse layers whose operands are computed: only initializers can get a new layout.

    Raises:
        PreconditionError: Naming the first such layer.

    Example:
        >>> text = '<ir_version: 10, opset_import: ["": 21, "qe_edge": 1]> g (float[1, 2, 64] x, float w) => (float y)'
        >>> model = ir.from_onnx_text(text + "{ y = qe_edge.QELinear (x, w) }")
        >>> model.graph[0].name = "mlp.up"
        >>> require_canonical(model)
        Traceback (most recent call last):
            ...
        onnx_ir.passes.PreconditionError: Operands of layer 'mlp.up' are initializers.
    """
    for node in linear_nodes(model):
        computed = [value for value in node.inputs[1:] if value is not None and value.const_value is None]
        require(not computed, f"Operands of layer '{node.name}' are initializers.")


def remove_unused(model: ir.Model) -> None:
    """Remove nodes and initializers that nothing uses.

    Example:
        >>> head = '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y)'
        >>> model = ir.from_onnx_text(head + "{ a = Abs (x)  y = Neg (x) }")
        >>> remove_unused(model)
        >>> [node.op_type for node in model.graph]
        ['Neg']
    """
    RemoveUnusedNodesPass()(model)


def untyped_values(nodes: Iterable[ir.Node]) -> list[str]:
    """Names of results whose type is not known.

    Example:
        >>> head = '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y)'
        >>> untyped_values(ir.from_onnx_text(head + "{ a = Abs (x)  y = Neg (a) }").graph)
        ['a']
    """
    return [value.name or "" for node in nodes for value in node.outputs if value.dtype is None]
