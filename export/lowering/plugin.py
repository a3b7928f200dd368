"""Replaces canonical `QELinear` nodes by nodes of the plugin's kernels, with weights laid out for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir
from onnx import helper

from qe_edge.export.lowering.inline import operands_of, shape_of
from qe_edge.export.lowering.passes import (
    InPlacePass,
    PassResult,
    ensure,
    linear_nodes,
    remove_unused,
    require_canonical,
)
from qe_edge.export.lowering.siblings import join_siblings
from qe_edge.export.op import DOMAIN, NAME, Attributes, initializer
from qe_edge.export.plugin_check import LayerForm, refusal
from qe_edge.numerics.grids import PER_CHANNEL
from qe_edge.prepack.linear import PackError
from qe_edge.prepack.lower import lower

LARGE = 8 << 20  # bytes of a packed tensor that is not kept in memory
LAYOUT = "layout_version"  # attribute of nodes whose weights are packed


class PackLayers(InPlacePass):
    """Replaces canonical layers by the plugin's nodes, and drops the functions.

    Requires a canonical graph; ensures that every layer says how its weights are laid out, and that no function is
    left: before TensorRT 10.7 a function of the same name would win over the plugin.

    Args:
        scratch: Whether a node has an output more, bytes that the kernels work in: ONNX Runtime gives it memory.

    Attributes:
        names: Names of the plugin's nodes.

    Example:
        >>> import qe_edge, torch
        >>> from qe_edge.export.layers import layers_graph
        >>> layer = qe_edge.quantize_linear(torch.ones(32, 64), torch.ones(2, 64), qe_edge.make_recipe(method="rtn"))
        >>> model = layers_graph({"mlp.up": layer})
        >>> work = PackLayers()
        >>> work(model).modified, work.names
        (True, ['mlp.up'])
    """

    def __init__(self, *, scratch: bool = False) -> None:
        super().__init__()
        self.scratch = scratch
        self.names: list[str] = []

    def requires(self, model: ir.Model) -> None:
        """Operands of layers are initializers."""
        require_canonical(model)

    def call(self, model: ir.Model) -> PassResult:
        """Pack all of them.

        Raises:
            TargetError: If the kernels cannot run a layer.
        """
        join_siblings(model)
        for node in linear_nodes(model):
            _pack(model.graph, node, scratch=self.scratch)
            self.names.append(node.name or "")
        model.functions.clear()
        remove_unused(model)
        return PassResult(model, modified=bool(self.names))

    def ensures(self, model: ir.Model) -> None:
        """Every layer is packed, and no function is left."""
        packed = all(LAYOUT in node.attributes for node in linear_nodes(model))
        ensure(packed, f"Every QELinear node has the attribute '{LAYOUT}'.")
        ensure(not model.functions, "No function is left.")


def pack_layers(model: ir.Model, *, scratch: bool = False) -> list[str]:
    """Pack every layer in place; its input and output become float16 when precisions are chosen.

    One node at a time goes through `qe_edge.prepack`: a model in one piece would exceed what a protobuf message holds.

    Args:
        model: A canonical graph.
        scratch: As of `PackLayers`.

    Returns:
        Names of the plugin's nodes.

    Raises:
        TargetError: If the kernels cannot run a layer.

    Example:
        >>> import qe_edge, torch
        >>> from qe_edge.export.layers import layers_graph
        >>> layer = qe_edge.quantize_linear(torch.ones(32, 64), torch.ones(2, 64), qe_edge.make_recipe(method="rtn"))
        >>> model = layers_graph({"mlp.up": layer})
        >>> pack_layers(model), model.graph[0].attributes[LAYOUT].as_int()
        (['mlp.up'], 4)
    """
    work = PackLayers(scratch=scratch)
    work(model)
    return work.names


def _pack(graph: ir.Graph, node: ir.Node, *, scratch: bool) -> None:
    """One layer as a node of the plugin."""
    layer = _Layer(ir.serde.serialize_node(node), [value for value in node.inputs[1:] if value is not None])
    attributes, tensors = layer.packed()
    inputs: list[ir.Value | None] = [node.inputs[0]]
    for number, packed in enumerate(tensors):
        tensor = packed if packed.nbytes < LARGE else layer.again(number, packed)
        value = initializer(packed.name or "", tensor)
        graph.register_initializer(value)
        inputs.append(value)
    output = node.outputs[0]
    y = ir.Value(type=output.type, shape=output.shape)
    outputs = [y]
    if scratch:
        outputs.append(ir.Value(name=f"{node.name}.scratch", type=ir.TensorType(ir.DataType.UINT8)))
    replacement = ir.Node(DOMAIN, NAME, inputs, attributes, outputs=outputs, name=node.name)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [replacement], [output], [y])


def layer_forms(model: ir.Model) -> list[LayerForm]:
    """The forms of the layers of a canonical graph that the plugin has to run, without neutral operands.

    Layers that read the same input may be joined to one, so each form has the outputs of all of them. A limit that a
    single one of them exceeds is found when they are packed.

    Example:
        >>> import qe_edge, torch
        >>> from qe_edge.export.layers import layers_graph
        >>> layer = qe_edge.quantize_linear(torch.ones(32, 64), torch.ones(2, 64), qe_edge.make_recipe(method="rtn"))
        >>> model = layers_graph({"mlp.up": layer})
        >>> layer_forms(model)
        [LayerForm(name='mlp.up', in_features=64, out_features=32, act_bits=8, group_size=-1, rank_shared=0,
        rank_routed=0, num_experts=0)]
    """
    nodes = linear_nodes(model)
    outputs: Counter[ir.Value] = Counter()
    for node in nodes:
        operands = operands_of(node)
        outputs[operands.x] += shape_of(operands.qweight)[1]
    return [_form(node, outputs) for node in nodes]


def _form(node: ir.Node, outputs: Mapping[ir.Value, int]) -> LayerForm:
    operands, attributes = operands_of(node), Attributes.of(node)
    width = shape_of(operands.qweight)[0]
    routed = attributes.num_experts > 1 and attributes.rank_routed > 0
    joined = attributes.num_experts * attributes.rank_routed
    return LayerForm(
        node.name or "",
        width,
        outputs[operands.x],
        act_bits=attributes.act_bits,
        group_size=PER_CHANNEL if attributes.group_size == width else attributes.group_size,
        rank_shared=attributes.rank_shared + (0 if routed else joined),
        rank_routed=attributes.rank_routed if routed else 0,
        num_experts=attributes.num_experts if routed else 0,
    )


def is_packed(node: ir.Node) -> bool:
    """Whether a node belongs to the plugin, or will: lowering changes its operands, not its kind.

    Example:
        >>> is_packed(ir.node("QELinear", [], domain="qe_edge")), is_packed(ir.node("MatMul", []))
        (True, False)
    """
    return (node.domain, node.op_type) == (DOMAIN, NAME)


@dataclass(frozen=True)
class _Layer:
    """A canonical layer.

    Attributes:
        node: Its node.
        constants: The node's inputs after x.
    """

    node: onnx.NodeProto
    constants: list[ir.Value]

    def packed(self) -> tuple[list[ir.Attr], list[ir.TensorProtocol]]:
        """The lowered node's attributes, and its tensors in the order of its inputs after x."""
        graph = helper.make_graph([self.node], "layer", [], [], [_tensor_proto(value) for value in self.constants])
        try:
            lowered = lower(helper.make_model(graph)).graph
        except PackError as error:
            raise refusal(self.node.name, str(error)) from error
        (found,) = (each for each in lowered.node if each.op_type == NAME)
        tensors = {tensor.name: tensor for tensor in lowered.initializer}
        attributes = [ir.serde.deserialize_attribute(attribute) for attribute in found.attribute]
        return attributes, [ir.serde.deserialize_tensor(tensors[name]) for name in found.input[1:]]

    def again(self, number: int, packed: ir.TensorProtocol) -> ir.LazyTensor:
        """One of the tensors, packed a second time when it is written, so that the model is not in memory twice."""
        shape = ir.Shape(packed.shape.numpy())
        return ir.LazyTensor(lambda: self.packed()[1][number], dtype=packed.dtype, shape=shape, name=packed.name)


def _tensor_proto(value: ir.Value) -> onnx.TensorProto:
    tensor = value.const_value
    if tensor is None:
        raise ValueError(f"'{value.name}' is no initializer")
    return helper.make_tensor(value.name or "", tensor.dtype.value, tensor.shape.numpy(), tensor.tobytes(), raw=True)
