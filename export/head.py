"""The quantized head in standard operators: it has a grid of its own, and shares no function with the other layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import onnx_ir as ir
from torch import nn

from qe_edge.export.layers import int4
from qe_edge.export.op import DOMAIN, LAYER, NAME, initializer
from qe_edge.layers.linear import QELinear
from qe_edge.numerics.grids import PER_CHANNEL


def heads_of(model: nn.Module, layers: Collection[str]) -> list[str]:
    """Names of the quantized layers that are a model's head: one or none.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> heads_of(load_model("demo").model, ["lm_head", "model.language_model.layers.0.mlp.up_proj"])
        ['lm_head']
    """
    found: Any = getattr(model, "get_output_embeddings", None)
    head = found() if found is not None else None
    return [name for name in layers if head is not None and model.get_submodule(name) is head]


def attach_head(model: ir.Model, heads: Mapping[str, QELinear]) -> None:
    """Replace a bare node by DequantizeLinear and MatMul, which ONNX Runtime and TensorRT fuse.

    Args:
        model: A traced graph; changed in place.
        heads: The head by its dotted name; empty if it is not quantized.

    Example:
        >>> import qe_edge, torch
        >>> layer = qe_edge.quantize_linear(torch.ones(32, 64), torch.ones(2, 64), qe_edge.make_recipe(method="rtn"))
        >>> text = '<ir_version: 10, opset_import: ["": 21, "qe_edge": 1]> g (float[1, 2, 64] x) => (float[1, 2, 32] y)'
        >>> model = ir.from_onnx_text(text + '{ y = qe_edge.QELinear <layer: string = "lm_head"> (x) }')
        >>> attach_head(model, {"lm_head": layer})
        >>> [node.op_type for node in model.graph]
        ['DequantizeLinear', 'MatMul']
    """
    for node in [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, NAME)]:
        name = node.attributes[LAYER].as_string()
        if name in heads:
            _replace(model.graph, node, name, heads[name])


def _replace(graph: ir.Graph, node: ir.Node, name: str, layer: QELinear) -> None:
    scales = layer.scales.float().T.contiguous()
    per_channel = layer.group_size == PER_CHANNEL
    operands = {"qweight": int4(layer.codes().T), "scales": ir.tensor(scales[0] if per_channel else scales)}
    if layer.bias is not None:
        operands["bias"] = ir.tensor(layer.bias.detach().float())
    values = []
    for key, tensor in operands.items():
        values.append(initializer(f"{name}.{key}", tensor))
        graph.register_initializer(values[-1])
    layout = {"axis": 1} if per_channel else {"axis": 0, "block_size": layer.group_size}
    weight = ir.node("DequantizeLinear", values[:2], layout, name=f"{name}/DequantizeLinear")
    product = ir.node("MatMul", [node.inputs[0], weight.outputs[0]], name=name)
    nodes = [weight, product]
    if layer.bias is not None:
        nodes.append(ir.node("Add", [product.outputs[0], values[2]], name=f"{name}/Add"))
    for one in nodes[:-1]:
        one.outputs[0].name = f"{one.name}.output"
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, [nodes[-1].outputs[0]])
