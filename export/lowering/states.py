"""Which nodes of a language graph compute a layer's state: they stay in float32.

A state stands for all tokens so far. What it loses to rounding at one token it has lost for all that follow, so that
transformers keeps it in float32, too.
"""

from __future__ import annotations

import onnx_ir as ir

from qe_edge.export.lowering.inline import FLOAT32
from qe_edge.runtime.cache_tensors import PAST, PRESENT, is_state

WEIGHTED = ("MatMul", "Gemm", "DequantizeLinear", "QELinear", "GroupQueryAttention", "MultiHeadAttention")


def is_state_tensor(name: str | None) -> bool:
    """Whether a graph's input or output is a layer's state.

    Example:
        >>> [is_state_tensor(name) for name in ("present.0.conv", "present.1.key", "logits")]
        [True, False, False]
    """
    return name is not None and name.startswith((PAST, PRESENT)) and is_state(name)


def state_nodes(graph: ir.Graph) -> set[ir.Node]:
    """The nodes between the last products before a layer's state and the state, and those that read it.

    Products of activations that must be in float32 have `FLOAT32` in their meta and are no end. A convolution that
    reads one of these nodes is one of them.

    Example:
        >>> text = '<ir_version: 10, opset_import: ["": 21]> g (float[2, 3] a, float[2, 2] past) => (float present)'
        >>> graph = ir.from_onnx_text(text + "{ b = Neg (a)  present = Concat <axis = 1> (past, b) }").graph
        >>> graph.outputs[0].name = "present.0.conv"
        >>> sorted(node.op_type for node in state_nodes(graph))
        ['Concat', 'Neg']
    """
    pending = [value.producer() for value in graph.outputs if is_state_tensor(value.name)]
    found: set[ir.Node] = set()
    while pending:
        node = pending.pop()
        if node is None or node in found or (node.op_type in WEIGHTED and FLOAT32 not in node.meta):
            continue
        found.add(node)
        pending += [value.producer() for value in node.inputs if value is not None]
    return found | {node for node in graph if node.op_type == "Conv" and _reads(node, found)}


def _reads(node: ir.Node, found: set[ir.Node]) -> bool:
    return any(value is not None and value.producer() in found for value in node.inputs)
