"""Fills bare `QELinear` nodes with a layer's weights and adds the functions that define them."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from qe_edge.export.op import DOMAIN, INPUTS, NAME, VERSION, Attributes, Operands, linear_function
from qe_edge.export.tracing import LAYER
from qe_edge.grids import pack_int4
from qe_edge.linear import QELinear

SHARED = ("down", "down_scale", "router")  # what stacked siblings have in common


def attach_layers(model: ir.Model, layers: Mapping[str, QELinear]) -> None:
    """Give every bare node its weights, attributes, name and function.

    Args:
        model: A traced graph; changed in place.
        layers: The quantized layers by dotted name.
    """
    owners: dict[int, ir.Value] = {}
    for node in list(model.graph):
        if (node.domain, node.op_type) != (DOMAIN, NAME):
            continue
        name = node.attributes[LAYER].as_string()
        x, output = node.inputs[0], node.outputs[0]
        if x is None:
            raise ValueError(f"node of {name} has no input")
        operands, attributes = layer_operands(name, x, layers[name], owners), layer_attributes(layers[name])
        for value in operands.values():
            if value is not None and value.const_value is not None and value.name not in model.graph.initializers:
                model.graph.register_initializer(value)
        function = linear_function(operands.present(), attributes)
        model.functions.setdefault(function.identifier(), function)
        inputs = operands.values()
        while inputs[-1] is None:
            inputs.pop()
        filled = ir.Node(
            DOMAIN,
            NAME,
            inputs,
            [ir.Attr(key, *_typed(value)) for key, value in attributes.onnx().items()],
            overload=function.overload,
            version=VERSION,
            name=name,
            metadata_props=node.metadata_props,
        )
        filled.outputs[0].type, filled.outputs[0].shape = output.type, output.shape
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [filled], [output], filled.outputs)
        filled.outputs[0].name = f"{name}.output"
    if model.functions:
        model.opset_imports[DOMAIN] = VERSION


def layer_attributes(layer: QELinear) -> Attributes:
    """The node's attributes."""
    return Attributes(
        weight_bits=layer.weight_bits,
        act_bits=layer.activation_bits,
        group_size=layer.group_size,
        rank_shared=layer.rank_shared,
        rank_routed=layer.rank_routed,
        num_experts=layer.num_experts,
    )


def layer_operands(name: str, x: ir.Value, layer: QELinear, owners: dict[int, ir.Value]) -> Operands:
    """Initializers of a layer in the operator's layout, `[in, out]` where PyTorch has `[out, in]`.

    Args:
        name: Dotted name; initializers are called `<name>.<input>`.
        x: The layer's input.
        layer: The layer.
        owners: Initializers of shared tensors met so far, by the tensor's identity; added to.
    """
    tensors: dict[str, ir.TensorProtocol] = {"qweight": int4(layer.codes().T), "scales": real(layer.scales.T)}
    if layer.zeros is not None:
        tensors["zeros"] = int4(layer.zeros.T)
    for key in ("inv_omega", "down", "up", "down_scale", "up_scale", "router", "bias"):
        tensor = getattr(layer, key)
        if tensor is None or (key in SHARED and id(tensor) in owners):
            continue
        matrix = tensor.T if tensor.ndim == 2 else tensor
        tensors[key] = ir.tensor(matrix.contiguous()) if tensor.dtype == torch.int8 else real(matrix)
    values = {}
    for key in INPUTS[1:]:
        tensor = getattr(layer, key)
        if key in tensors:
            values[key] = _initializer(f"{name}.{key}", tensors[key])
            owners[id(tensor)] = values[key]
        elif tensor is not None:
            values[key] = owners[id(tensor)]
    return Operands(x, **values)


def int4(codes: Tensor) -> ir.TensorProtocol:
    """INT4 tensor of int8 codes; ONNX packs across rows, low nibble first."""
    packed = pack_int4(codes.reshape(1, -1))[0]
    return ir.PackedTensor(packed, ir.DataType.INT4, shape=list(codes.shape))


def real(tensor: Tensor) -> ir.TensorProtocol:
    """float32 tensor, the canonical T."""
    return ir.tensor(tensor.detach().float().contiguous())


def _initializer(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    tensor.name = name
    return ir.Value(
        name=name, const_value=tensor, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype)
    )


def _typed(value: int | str) -> tuple[ir.AttributeType, int | str]:
    return (ir.AttributeType.INT if isinstance(value, int) else ir.AttributeType.STRING), value
