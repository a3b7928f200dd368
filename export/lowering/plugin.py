"""Replaces canonical `QELinear` nodes by those of the TensorRT plugin, with weights laid out for its kernels."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import helper

from qe_edge.errors import TargetError
from qe_edge.export.lowering.siblings import join_siblings
from qe_edge.export.op import DOMAIN, NAME
from qe_edge.prepack.linear import PackError
from qe_edge.prepack.lower import lower


def pack_layers(model: ir.Model) -> list[str]:
    """Pack every layer in place; its input and output become float16 when precisions are chosen.

    One node at a time goes through `qe_edge.prepack`: a model in one piece would exceed what a protobuf message holds.

    Returns:
        Names of the plugin's nodes.

    Raises:
        TargetError: If the kernels cannot run a layer.
    """
    join_siblings(model)
    names = []
    for node in [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, NAME)]:
        attributes, tensors = _packed(node)
        inputs: list[ir.Value | None] = [node.inputs[0]]
        for tensor in tensors:
            shape, kind = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
            value = ir.Value(name=tensor.name, const_value=tensor, shape=shape, type=kind)
            model.graph.register_initializer(value)
            inputs.append(value)
        output = node.outputs[0]
        y = ir.Value(type=output.type, shape=output.shape)
        replacement = ir.Node(DOMAIN, NAME, inputs, attributes, outputs=[y], name=node.name)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [replacement], [output], [y])
        names.append(node.name or "")
    model.functions.clear()  # before TensorRT 10.7 a function of the same name would win over the plugin
    for name, value in list(model.graph.initializers.items()):
        if not value.uses():
            del model.graph.initializers[name]
    return names


def is_packed(node: ir.Node) -> bool:
    """Whether a node is the plugin's."""
    return (node.domain, node.op_type) == (DOMAIN, NAME)


def _packed(node: ir.Node) -> tuple[list[ir.Attr], list[ir.TensorProtocol]]:
    """The lowered node's attributes, and its tensors in the order of its inputs after x."""
    constants = [_tensor_proto(value) for value in node.inputs[1:] if value is not None]
    graph = helper.make_graph([ir.serde.serialize_node(node)], "layer", [], [], constants)
    try:
        lowered = lower(helper.make_model(graph)).graph
    except PackError as error:
        problem, _, remedy = str(error).partition(". ")
        raise TargetError(
            f"The plugin cannot run the layer '{node.name}': {problem}.", remedy or "Build without --plugin."
        ) from error
    (found,) = (each for each in lowered.node if each.op_type == NAME)
    tensors = {tensor.name: tensor for tensor in lowered.initializer}
    attributes = [ir.serde.deserialize_attribute(attribute) for attribute in found.attribute]
    return attributes, [ir.serde.deserialize_tensor(tensors[name]) for name in found.input[1:]]


def _tensor_proto(value: ir.Value) -> onnx.TensorProto:
    tensor = value.const_value
    if tensor is None:
        raise ValueError(f"'{value.name}' is no initializer")
    return helper.make_tensor(value.name or "", tensor.dtype.value, tensor.shape.numpy(), tensor.tobytes(), raw=True)
