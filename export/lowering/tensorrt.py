"""The lowering for every TensorRT: products in float16, layers in standard operators or as nodes of the plugin."""

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

from qe_edge.export.attention import expand_attention
from qe_edge.export.cached_attention import expand_cached_attention
from qe_edge.export.lowering.expand import expand_gelu
from qe_edge.export.lowering.inline import inline_layers
from qe_edge.export.lowering.plugin import is_packed, pack_layers
from qe_edge.export.lowering.precision import CACHE, scale_queries, to_half
from qe_edge.runtime.engine_info import Precision

SMALL = 1024  # elements up to which equal constants are looked for
PLUGIN_PRODUCTS = {bits: f"int{bits} weights, plugin" for bits in (3, 4)}  # by the bits that weights are packed with
WEIGHTS = {ir.DataType.INT4: "int4", ir.DataType.INT8: "int8"}


def lower_for_tensorrt(model: ir.Model, *, plugin: bool = False, capacity: int | None = None) -> Precision:
    """Lower a canonical graph in place; returns the precision of every product.

    Args:
        model: A canonical graph.
        plugin: Whether layers become nodes of the plugin instead of standard operators.
        capacity: Tokens of the KV cache, which is then written in place, by TensorScatter; None for a cache of any
            capacity, which is copied at every call.

    Raises:
        TargetError: If a layer does not fit TensorRT, or the plugin.
        ValueError: If types and shapes do not fit together.

    Example:
        >>> import qe_edge, torch
        >>> from qe_edge.export.layers import attach_layers
        >>> layer = qe_edge.quantize_linear(torch.ones(32, 64), torch.ones(2, 64), qe_edge.make_recipe(method="rtn"))
        >>> text = '<ir_version: 10, opset_import: ["": 21, "qe_edge": 1]> g (float[1, 2, 64] x) => (float[1, 2, 32] y)'
        >>> model = ir.from_onnx_text(text + '{ y = qe_edge.QELinear <layer: string = "mlp.up"> (x) }')
        >>> attach_layers(model, {"mlp.up": layer})
        >>> lower_for_tensorrt(model).products
        {'mlp.up/MatMul_14': 'int4 weights, float16'}
    """
    expand_attention(model)
    if capacity is not None:
        _fix_capacity(model, capacity)
    expand_cached_attention(model, write="ScatterND" if capacity is None else "TensorScatter")
    if plugin:
        pack_layers(model)
    else:
        inline_layers(model)
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


def _fix_capacity(model: ir.Model, capacity: int) -> None:
    """TensorRT writes in place into caches of a constant size alone."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if (value.name or "").startswith(CACHE) and value.shape is not None:
            batch, heads, _, width = value.shape
            value.shape = ir.Shape([batch, heads, capacity, width])


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
