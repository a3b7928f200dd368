"""What the lowerings for GPUs have in common: products in float16, and a list of what computes in which precision."""

from __future__ import annotations

import logging
from collections import Counter

import onnx_ir as ir
from onnx_ir.passes.common import (
    CheckerPass,
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    LiftConstantsToInitializersPass,
    ShapeInferencePass,
)

from qe_edge.export.lowering.expand import expand_gelu
from qe_edge.export.lowering.plugin import is_packed
from qe_edge.export.lowering.precision import scale_queries, to_half
from qe_edge.runtime.engine_info import Precision

SMALL = 1024  # elements up to which equal constants are looked for
PLUGIN_PRODUCTS = {bits: f"int{bits} weights, plugin" for bits in (3, 4)}  # by the bits that weights are packed with
WEIGHTS = {ir.DataType.INT4: "int4", ir.DataType.INT8: "int8"}


def finish_in_half(model: ir.Model) -> Precision:
    """Convert a graph without `QELinear` functions to float16 in place; returns what computes in which precision.

    Raises:
        ValueError: If types and shapes do not fit together.

    Example:
        >>> text = '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) { y = Tanh (x) }'
        >>> finish_in_half(ir.from_onnx_text(text)).others
        {'Tanh float32': 1}
    """
    expand_gelu(model)
    # siblings round the same input and share a router; what is computed twice need be parsed and built only once
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    DeduplicateInitializersPass(size_limit=SMALL)(model)
    CommonSubexpressionEliminationPass()(model)
    _infer_shapes(model)  # types of the new values
    scale_queries(model)
    precision = to_half(model)
    CheckerPass()(model)
    products: dict[str, str] = {}
    others: Counter[str] = Counter()
    for node in model.graph:
        compute = precision.get(node.name or "")
        if is_packed(node):
            products[node.name or ""] = PLUGIN_PRODUCTS[node.attributes["weight_bits"].as_int()]
        elif node.op_type in ("MatMul", "Gemm") and compute is not None:
            products[node.name or ""] = f"{_weights(node)} weights, {compute}" if _weights(node) else compute
        elif compute is not None and node.op_type != "DequantizeLinear":
            others[f"{node.op_type} {compute}"] += 1
    return Precision(products=products, others=dict(sorted(others.items())))


def _infer_shapes(model: ir.Model) -> None:
    """Infer types and shapes; the pass itself only logs that it failed, and leaves the model as it was.

    Raises:
        ValueError: If it failed.
    """
    reasons: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        if record.exc_info:
            reasons.append(str(record.exc_info[1]))
        return not record.exc_info

    logger = logging.getLogger(ShapeInferencePass.__module__)
    logger.addFilter(note)
    try:
        ShapeInferencePass()(model)
    finally:
        logger.removeFilter(note)
    if reasons:
        raise ValueError(reasons[0])


def _weights(node: ir.Node) -> str | None:
    """Storage of a product's quantized weights."""
    producer = node.inputs[1].producer() if node.inputs[1] is not None else None
    if producer is None or producer.op_type != "DequantizeLinear" or producer.inputs[0] is None:
        return None
    dtype = producer.inputs[0].dtype
    return None if dtype is None else WEIGHTS.get(dtype)
