"""The lowering for every TensorRT: products in float16, layers in standard operators or as nodes of the plugin."""

from __future__ import annotations

import onnx_ir as ir

from qe_edge.export.attention import expand_attention
from qe_edge.export.cached_attention import expand_cached_attention
from qe_edge.export.lowering.delta_rule import expand_delta_rule
from qe_edge.export.lowering.half import finish_in_half
from qe_edge.export.lowering.inline import inline_layers
from qe_edge.export.lowering.plugin import pack_layers
from qe_edge.export.lowering.stored_types import WidenWeights
from qe_edge.runtime.cache_tensors import PAST, PRESENT, is_state
from qe_edge.runtime.engine_info import Precision


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
        >>> from qe_edge.export.layers import layers_graph
        >>> layer = qe_edge.quantize_linear(torch.ones(32, 64), torch.ones(2, 64), qe_edge.make_recipe(method="rtn"))
        >>> model = layers_graph({"mlp.up": layer})
        >>> lower_for_tensorrt(model).products
        {'mlp.up/MatMul_14': 'int4 weights, float16'}
    """
    WidenWeights()(model)
    expand_attention(model)
    if capacity is not None:
        _fix_capacity(model, capacity)
    expand_cached_attention(model, write="ScatterND" if capacity is None else "TensorScatter")
    expand_delta_rule(model)
    if plugin:
        pack_layers(model)
    else:
        inline_layers(model)
    return finish_in_half(model)


def _fix_capacity(model: ir.Model, capacity: int) -> None:
    """TensorRT writes in place into caches of a constant size alone."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        name = value.name or ""
        if name.startswith((PAST, PRESENT)) and not is_state(name) and value.shape is not None:
            batch, heads, _, width = value.shape
            value.shape = ir.Shape([batch, heads, capacity, width])
