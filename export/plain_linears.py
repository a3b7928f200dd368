"""Linear layers that are not quantized: a graph's file holds their weights in the checkpoint's type.

A Cast widens them to float32. They are traced as bare nodes, like quantized layers, so that none is widened in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import tape
from torch import Tensor, nn

from qe_edge.export.op import DOMAIN, LAYER, NAME, initializer
from qe_edge.models.stored import placeholder
from qe_edge.system.errors import ModelError


@dataclass(frozen=True)
class PlainLinear:
    """The tensors of a linear layer.

    Attributes:
        weight: `[out, in]`, in the type of the checkpoint.
        bias: `[out]`, if there is one.
    """

    weight: Tensor
    bias: Tensor | None


def plain_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The unquantized linear layers of a model by their dotted names.

    Example:
        >>> list(plain_linears(nn.ModuleDict({"proj": nn.Linear(4, 2), "norm": nn.LayerNorm(2)})))
        ['proj']
    """
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


@contextmanager
def set_aside(linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, PlainLinear]]:
    """Layers hold float32 placeholders of NaN while the context is open.

    Args:
        linears: The layers by name.

    Yields:
        Their tensors by the same names.

    Example:
        >>> layer = nn.Linear(4, 2).bfloat16()
        >>> with set_aside({"proj": layer}) as found:
        ...     layer.weight.dtype, found["proj"].weight.dtype
        (torch.float32, torch.bfloat16)
        >>> layer.weight.dtype
        torch.bfloat16
    """
    tensors: dict[int, tuple[Tensor, Tensor]] = {}  # a head may share its weight
    found = {}
    for name, linear in linears.items():
        for tensor in linear.parameters(recurse=False):
            tensors.setdefault(id(tensor), (tensor, tensor.data))
        bias: Tensor | None = linear.bias
        found[name] = PlainLinear(linear.weight.detach(), None if bias is None else bias.detach())
    for parameter, _ in tensors.values():
        parameter.data = placeholder(tuple(parameter.shape), torch.float32)
    try:
        yield found
    finally:
        for parameter, data in tensors.values():
            parameter.data = data


def attach_plain_linears(model: ir.Model, linears: Mapping[str, PlainLinear]) -> None:
    """Replace bare nodes of unquantized layers by MatMul, and Add of a bias.

    Args:
        model: A traced graph; changed in place.
        linears: The tensors of the layers by dotted name.

    Raises:
        ModelError: If the graph uses a weight outside its layer.

    Example:
        >>> text = '<ir_version: 10, opset_import: ["": 21, "qe_edge": 1]> g (float[1, 2, 4] x) => (float[1, 2, 3] y)'
        >>> model = ir.from_onnx_text(text + '{ y = qe_edge.QELinear <layer: string = "proj"> (x) }')
        >>> attach_plain_linears(model, {"proj": PlainLinear(torch.ones(3, 4, dtype=torch.bfloat16), None)})
        >>> [node.op_type for node in model.graph], model.graph.initializers["proj.weight"].dtype.name
        (['Cast', 'MatMul'], 'BFLOAT16')
    """
    _check_whole(model.graph)
    bare = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, NAME)]
    uses: Counter[str] = Counter()
    for node in bare:
        name = node.attributes[LAYER].as_string()
        if name in linears:
            _replace(model.graph, node, name, linears[name], uses[name])
            uses[name] += 1


def _check_whole(graph: ir.Graph) -> None:
    """No placeholder is part of a graph."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT and np.isnan(tensor.numpy()).any():
            raise ModelError(
                f"The graph '{graph.name}' uses a weight outside its linear layer, as '{value.name}'.",
                "Use the versions of torch and transformers in constraints.txt.",
            )


def _replace(graph: ir.Graph, node: ir.Node, name: str, linear: PlainLinear, use: int) -> None:
    """Put the product in place of a bare node. Layers that a graph runs twice have their tensors once."""
    label = f"{name}/{use}" if use else name
    key = f"{name}.weight"
    weight = graph.initializers.get(key) or _registered(graph, key, _transposed(linear.weight))
    ops = tape.Tape()
    if linear.weight.dtype != torch.float32:
        weight = ops.op("Cast", [weight], {"to": ir.DataType.FLOAT.value}, name=f"{label}/Cast")
    y = ops.op("MatMul", [node.inputs[0], weight], name=label)
    if linear.bias is not None:
        y.name = f"{label}.product"
        key = f"{name}.bias"
        bias = graph.initializers.get(key) or _registered(graph, key, ir.tensor(linear.bias.float()))
        y = ops.op("Add", [y, bias], name=f"{label}/Add")
    if weight.producer() is not None:
        weight.name, weight.type = f"{label}.weight.float32", ir.TensorType(ir.DataType.FLOAT)
        weight.shape = ir.Shape(tuple(linear.weight.shape)[::-1])
    ir.convenience.replace_nodes_and_values(graph, node, [node], ops.nodes, node.outputs, [y])


def _transposed(weight: Tensor) -> ir.TensorProtocol:
    """A weight as `[in, out]`; the transposed copy is made when it is written."""
    dtype = ir.tensor(weight[:0]).dtype
    shape = ir.Shape(tuple(weight.shape)[::-1])
    return ir.LazyTensor(lambda: ir.tensor(weight.T.contiguous()), dtype=dtype, shape=shape)


def _registered(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = initializer(name, tensor)
    graph.register_initializer(value)
    return value
