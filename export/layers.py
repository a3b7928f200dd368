"""Fills bare `QELinear` nodes with a layer's weights and adds the function that defines them.

One function serves all layers of a graph, so all have the same operands. A layer that lacks one gets a neutral one: a
factor of 1, a bias or zero point of 0, a single expert that every token takes, a correction of rank 1 that is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from qe_edge.export.op import (
    DOMAIN,
    INPUTS,
    LAYER,
    NAME,
    OPSET,
    VERSION,
    Attributes,
    Operands,
    initializer,
    linear_function,
)
from qe_edge.layers.linear import QELinear
from qe_edge.layers.torch_parts import PART_TENSORS
from qe_edge.numerics.grids import PER_CHANNEL, pack_int4
from qe_edge.system.errors import ModelError

SHARED = ("down", "down_scale", "router")  # tensors that stacked siblings share

NEUTRAL: dict[str, Callable[[QELinear], Tensor]] = {
    "zeros": lambda layer: torch.zeros(layer.scales.T.shape, dtype=torch.int8),
    "inv_omega": lambda layer: torch.ones(layer.in_features),
    "down": lambda layer: torch.zeros(layer.in_features, 1),
    "up": lambda layer: torch.zeros(1, layer.out_features),
    "down_scale": lambda layer: torch.ones(1 if layer.down is None else len(layer.down)),
    "up_scale": lambda layer: torch.ones(layer.out_features),
    "router": lambda layer: torch.zeros(layer.in_features, 1),
    "bias": lambda layer: torch.zeros(layer.out_features),
}
LARGE = ("qweight", "down", "up")


@dataclass(frozen=True)
class GraphForm:
    """Properties that all layers of one graph share.

    Attributes:
        present: Inputs that all nodes have.
        act_bits: Activation bits of all nodes.
        per_channel: Whether no layer has groups or zero points; else a layer without groups has one of its width.
        coded: Whether all factors are INT8 or INT4; if only some are, all become float.
    """

    present: tuple[str, ...]
    act_bits: int
    per_channel: bool
    coded: bool

    @classmethod
    def of(cls, layers: list[QELinear]) -> GraphForm:
        """The form that fits all `layers`.

        Raises:
            ModelError: If they quantize activations to different widths.
        """
        widths = {layer.activation_bits for layer in layers}
        if len(widths) > 1:
            raise ModelError(
                f"Layers of one part of the model have activations of {sorted(widths)} bits.",
                "Quantize the model with one scheme.",
            )
        corrected = [layer for layer in layers if layer.down is not None]
        coded = all(layer.down_scale is not None and layer.up_scale is not None for layer in corrected)
        present = {key for key in INPUTS[1:] for layer in layers if getattr(layer, key) is not None}
        if not coded:
            present -= {"down_scale", "up_scale"}
        return cls(
            present=("x", *(key for key in INPUTS if key in present)),
            act_bits=widths.pop(),
            per_channel=all(layer.group_size == PER_CHANNEL and layer.zeros is None for layer in layers),
            coded=coded,
        )


def check_layers(layers: Mapping[str, QELinear]) -> None:
    """Refuse layers that the operator cannot hold, before anything is traced.

    Raises:
        ModelError: Naming the first one.

    Example:
        >>> import qe_edge
        >>> recipe = qe_edge.make_recipe(method="spqr", scheme="w4a16")
        >>> layer = qe_edge.quantize_linear(torch.randn(32, 64), torch.randn(99, 64), recipe)
        >>> check_layers({"mlp.up": layer})
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ModelError: The layer 'mlp.up' cannot be exported: the operator has no
        outlier_starts, outlier_columns, outlier_values. Load the checkpoint with qe_edge.load_quantized in
        PyTorch, or quantize with another method.
    """
    for name, layer in layers.items():
        if layer.parts is not None:
            present = ", ".join(part for part in PART_TENSORS if getattr(layer, part) is not None)
            raise ModelError(
                f"The layer '{name}' cannot be exported: the operator has no {present or 'activation groups'}.",
                "Load the checkpoint with qe_edge.load_quantized in PyTorch, or quantize with another method.",
            )


def attach_layers(model: ir.Model, layers: Mapping[str, QELinear]) -> None:
    """Give every bare node its weights, attributes and name, and the model its function.

    Args:
        model: A traced graph; changed in place.
        layers: The quantized layers by dotted name.

    Example:
        >>> import qe_edge
        >>> layer = qe_edge.quantize_linear(torch.ones(32, 64), torch.ones(2, 64), qe_edge.make_recipe(method="rtn"))
        >>> text = '<ir_version: 10, opset_import: ["": 21, "qe_edge": 1]> g (float[1, 2, 64] x) => (float[1, 2, 32] y)'
        >>> model = ir.from_onnx_text(text + '{ y = qe_edge.QELinear <layer: string = "mlp.up"> (x) }')
        >>> attach_layers(model, {"mlp.up": layer})
        >>> [value.name for value in model.graph[0].inputs], list(model.functions)
        (['x', 'mlp.up.qweight', 'mlp.up.scales'], [('qe_edge', 'QELinear', '')])
    """
    bare = {
        node.attributes[LAYER].as_string(): node
        for node in model.graph
        if (node.domain, node.op_type) == (DOMAIN, NAME)
    }
    if not bare:
        return
    form = GraphForm.of([layers[name] for name in bare])
    owners: dict[int, ir.Value] = {}
    for name, node in bare.items():
        output = node.outputs[0]
        operands = layer_operands(name, _input(node), layers[name], form, owners)
        for value in operands.values():
            if value is not None and value.const_value is not None and value.name not in model.graph.initializers:
                model.graph.register_initializer(value)
        inputs = operands.values()
        while inputs[-1] is None:
            inputs.pop()
        filled = ir.node(
            NAME,
            inputs,
            layer_attributes(layers[name], form).onnx(),
            domain=DOMAIN,
            version=VERSION,
            name=name,
            outputs=[ir.Value(type=output.type, shape=output.shape)],
        )
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [filled], [output], filled.outputs)
        filled.outputs[0].name = f"{name}.output"
    function = linear_function(form.present, form.act_bits, form.per_channel)
    model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = VERSION


def layers_graph(layers: Mapping[str, QELinear]) -> ir.Model:
    """A canonical graph of nothing but layers, without tracing.

    Args:
        layers: The layers by dotted name.

    Returns:
        A graph in which every layer reads an input of its own, `<name>.x` `[batch, sequence, in]` float32, and gives
        `<name>.output` `[batch, sequence, out]`.

    Example:
        >>> import qe_edge
        >>> layer = qe_edge.quantize_linear(torch.ones(32, 64), torch.ones(2, 64), qe_edge.make_recipe(method="rtn"))
        >>> [(node.name, node.op_type) for node in layers_graph({"mlp.up": layer}).graph]
        [('mlp.up', 'QELinear')]
    """
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="layers")
    for name, layer in layers.items():
        x = ir.Value(
            name=f"{name}.x",
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape(["batch", "sequence", layer.in_features]),
        )
        graph.inputs.append(x)
        bare = ir.node(NAME, [x], {LAYER: name}, domain=DOMAIN, version=1)
        bare.outputs[0].name = f"{name}.bare"
        bare.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        bare.outputs[0].shape = ir.Shape(["batch", "sequence", layer.out_features])
        graph.append(bare)
        graph.outputs.append(bare.outputs[0])
    model = ir.Model(graph, ir_version=10)
    attach_layers(model, layers)
    return model


def layer_attributes(layer: QELinear, form: GraphForm) -> Attributes:
    """The node's attributes; neutral operands count.

    Example:
        >>> import qe_edge
        >>> layer = qe_edge.quantize_linear(torch.ones(32, 64), torch.ones(2, 64), qe_edge.make_recipe(method="rtn"))
        >>> layer_attributes(layer, GraphForm.of([layer]))
        Attributes(weight_bits=4, act_bits=8, group_size=-1, rank_shared=0, rank_routed=0, num_experts=0)
    """
    group, shared, experts = layer.group_size, layer.rank_shared, layer.num_experts
    if group == PER_CHANNEL and not form.per_channel:
        group = layer.in_features
    if "down" in form.present and layer.down is None:
        shared = 1
    if "router" in form.present and layer.router is None:
        # every column belongs to all tokens, so no router is needed
        shared, experts = shared + layer.rank_routed * experts, 1
    return Attributes(
        weight_bits=layer.weight_bits,
        act_bits=layer.activation_bits,
        group_size=group,
        rank_shared=shared,
        rank_routed=layer.rank_routed if layer.router is not None else 0,
        num_experts=experts,
    )


def layer_operands(name: str, x: ir.Value, layer: QELinear, form: GraphForm, owners: dict[int, ir.Value]) -> Operands:
    """Initializers of a layer in the operator's layout, `[in, out]` where PyTorch has `[out, in]`.

    Args:
        name: Dotted name; initializers are called `<name>.<input>`.
        x: The layer's input.
        layer: The layer.
        form: The graph's form.
        owners: Initializers of shared tensors met so far, by the tensor's identity; added to.

    Example:
        >>> import qe_edge
        >>> layer = qe_edge.quantize_linear(torch.ones(32, 64), torch.ones(2, 64), qe_edge.make_recipe(method="rtn"))
        >>> operands = layer_operands("mlp.up", ir.Value(name="x"), layer, GraphForm.of([layer]), owners={})
        >>> operands.present(), operands.qweight.name
        (('x', 'qweight', 'scales'), 'mlp.up.qweight')
    """
    values = {}
    for key in form.present[1:]:
        stored = getattr(layer, key)
        if key in SHARED and id(stored) in owners:
            values[key] = owners[id(stored)]
            continue
        values[key] = initializer(f"{name}.{key}", _when_written(key, layer, form))
        if stored is not None:
            owners[id(stored)] = values[key]
    return Operands(x, **values)


def _when_written(key: str, layer: QELinear, form: GraphForm) -> ir.TensorProtocol:
    """One operand. A large one is converted when it is written, so that only one of them is in memory."""
    stored = getattr(layer, key)
    if key not in LARGE or stored is None:
        return _tensor(key, layer, form)
    rank = layer.rank_shared + layer.num_experts * layer.rank_routed
    shape = {
        "qweight": (layer.in_features, layer.out_features),
        "down": (layer.in_features, rank),
        "up": (rank, layer.out_features),
    }[key]
    dtype = ir.DataType.INT4
    if key != "qweight" and not (form.coded and layer.packed_factors):
        dtype = ir.DataType.INT8 if form.coded else ir.DataType.FLOAT
    return ir.LazyTensor(lambda: _tensor(key, layer, form), dtype=dtype, shape=ir.Shape(shape))


def _tensor(key: str, layer: QELinear, form: GraphForm) -> ir.TensorProtocol:
    """One operand in the operator's layout and type."""
    if key == "qweight":
        return int4(layer.codes().T)
    factor = key in ("down", "up")
    tensor = {"down": layer.down_codes, "up": layer.up_codes}[key]() if factor else getattr(layer, key)
    if tensor is None:
        tensor = NEUTRAL[key](layer)
    elif factor and not form.coded:
        scale = getattr(layer, f"{key}_scale")  # one per rank of down, per output of up: rows in PyTorch either way
        tensor = (tensor if scale is None else tensor.float() * scale.float().unsqueeze(1)).T
    elif tensor.ndim == 2:
        tensor = tensor.T
    if key == "zeros" or (factor and layer.packed_factors and form.coded):
        return int4(tensor)
    if factor and form.coded:
        return ir.tensor(tensor.to(torch.int8).contiguous())
    return ir.tensor(tensor.detach().float().contiguous())


def int4(codes: Tensor) -> ir.TensorProtocol:
    """INT4 tensor of int8 codes; ONNX packs across rows, low nibble first.

    Example:
        >>> tensor = int4(torch.tensor([[1, -2], [3, -4]], dtype=torch.int8))
        >>> tensor.dtype.name, tensor.numpy().tolist()
        ('INT4', [[1, -2], [3, -4]])
    """
    packed = pack_int4(codes.reshape(1, -1))[0]
    return ir.PackedTensor(packed, ir.DataType.INT4, shape=list(codes.shape))


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    if value is None:
        raise ValueError(f"node {node.name} has no input")
    return value
