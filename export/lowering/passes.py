"""What our passes over a graph have in common: each states what it requires and what it ensures, and checks both.

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
    """The `QELinear` nodes of a graph, in its order: canonical ones, or the plugin's."""
    return [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, NAME)]


def require(holds: bool, condition: str) -> None:
    """Refuse a graph that a pass cannot take.

    Raises:
        PreconditionError: If the condition does not hold.
    """
    if not holds:
        raise PreconditionError(condition)


def ensure(holds: bool, condition: str) -> None:
    """Refuse to hand on a graph that is not what a pass promises.

    Raises:
        PostconditionError: If the condition does not hold.
    """
    if not holds:
        raise PostconditionError(condition)


def require_canonical(model: ir.Model) -> None:
    """Refuse layers whose operands are computed: only initializers can be laid out anew.

    Raises:
        PreconditionError: Naming the first such layer.
    """
    for node in linear_nodes(model):
        computed = [value for value in node.inputs[1:] if value is not None and value.const_value is None]
        require(not computed, f"Operands of layer '{node.name}' are initializers.")


def remove_unused(model: ir.Model) -> None:
    """Remove nodes and initializers that nothing uses."""
    RemoveUnusedNodesPass()(model)


def untyped_values(nodes: Iterable[ir.Node]) -> list[str]:
    """Names of results whose type is not known."""
    return [value.name or "" for node in nodes for value in node.outputs if value.dtype is None]
