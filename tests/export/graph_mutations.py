"""Damages a graph on purpose: every function changes one thing, drawn from a random generator."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper

Mutation = Callable[[onnx.ModelProto, random.Random], None]

SIZES = (0, -1, 1, 2, 3, 7, 2**31, 2**62)
OPERATORS = ("NoSuchOperator", "MatMul", "Gelu", "Cast", "Loop", "If", "Reshape", "QELinear", "")


def mutate(path: Path, out: Path, seed: int, kind: str | None = None) -> str:
    """Write a damaged copy of a graph; returns the name of what was done to it, drawn if it is not given."""
    draw = random.Random(seed)
    name = kind or draw.choice(sorted(BYTES) + 3 * sorted(MUTATIONS))
    if name in BYTES:
        out.write_bytes(BYTES[name](path.read_bytes(), draw))
        return name
    model = onnx.load(path, load_external_data=False)
    for _ in range(draw.choice((1, 1, 1, 3))):
        MUTATIONS[name](model, draw)
    out.write_bytes(model.SerializeToString())
    return name


def _cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def _flip(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 20))):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _insert(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    return data[:place] + draw.randbytes(draw.choice((1, 8, 100))) + data[place:]


def _node(model: onnx.ModelProto, draw: random.Random) -> NodeProto:
    nodes = list(model.graph.node) + [node for function in model.functions for node in function.node]
    layers = [node for node in model.graph.node if node.op_type == "QELinear"]
    return draw.choice(layers if layers and draw.random() < 0.4 else nodes)


def _initializer(model: onnx.ModelProto, draw: random.Random) -> TensorProto:
    return draw.choice(list(model.graph.initializer))


def drop_initializer(model: onnx.ModelProto, draw: random.Random) -> None:
    del model.graph.initializer[draw.randrange(len(model.graph.initializer))]


def drop_node(model: onnx.ModelProto, draw: random.Random) -> None:
    del model.graph.node[draw.randrange(len(model.graph.node))]


def drop_function(model: onnx.ModelProto, draw: random.Random) -> None:
    del model.functions[:]


def drop_input(model: onnx.ModelProto, draw: random.Random) -> None:
    node = _node(model, draw)
    if node.input:
        del node.input[draw.randrange(len(node.input))]


def empty_input(model: onnx.ModelProto, draw: random.Random) -> None:
    node = _node(model, draw)
    if node.input:
        node.input[draw.randrange(len(node.input))] = ""


def other_input(model: onnx.ModelProto, draw: random.Random) -> None:
    """Often a cycle."""
    node, other = _node(model, draw), _node(model, draw)
    if node.input and other.output:
        node.input[draw.randrange(len(node.input))] = draw.choice([*other.output, *other.input, "nowhere"])


def cycle(model: onnx.ModelProto, draw: random.Random) -> None:
    node = draw.choice(list(model.graph.node))
    if node.input:
        node.input[0] = node.output[0]


def more_inputs(model: onnx.ModelProto, draw: random.Random) -> None:
    node = _node(model, draw)
    node.input.extend([*node.input, *node.input])


def drop_output(model: onnx.ModelProto, draw: random.Random) -> None:
    del _node(model, draw).output[:]


def drop_attribute(model: onnx.ModelProto, draw: random.Random) -> None:
    node = _node(model, draw)
    if node.attribute:
        del node.attribute[draw.randrange(len(node.attribute))]


def other_attribute(model: onnx.ModelProto, draw: random.Random) -> None:
    node = _node(model, draw)
    value = draw.choice([0, -1, 2**40, -(2**63), 1.5, "text", [1, 2], [1.0], b"", float("nan")])
    if node.attribute:
        old = draw.choice(list(node.attribute))
        node.attribute.remove(old)
        node.attribute.append(helper.make_attribute(old.name, value))


def wrong_attribute_type(model: onnx.ModelProto, draw: random.Random) -> None:
    node = _node(model, draw)
    if node.attribute:
        draw.choice(list(node.attribute)).type = draw.choice(list(AttributeProto.AttributeType.values()))


def twice_the_attribute(model: onnx.ModelProto, draw: random.Random) -> None:
    node = _node(model, draw)
    if node.attribute:
        node.attribute.append(node.attribute[0])


def other_operator(model: onnx.ModelProto, draw: random.Random) -> None:
    _node(model, draw).op_type = draw.choice(OPERATORS)


def other_domain(model: onnx.ModelProto, draw: random.Random) -> None:
    _node(model, draw).domain = draw.choice(("qe_edge", "com.microsoft", "nosuch", "ai.onnx.ml"))


def same_name(model: onnx.ModelProto, draw: random.Random) -> None:
    _node(model, draw).name = _node(model, draw).name


def no_name(model: onnx.ModelProto, draw: random.Random) -> None:
    _node(model, draw).name = ""


def clashing_name(model: onnx.ModelProto, draw: random.Random) -> None:
    """A value under the name that a lowering gives to one of its own."""
    layers = [node for node in model.graph.node if node.op_type == "QELinear"]
    if layers:
        layer = draw.choice(layers)
        ending = draw.choice((".block_scales", ".offsets", ".packed.weight", "/MatMul_1.output", ".down.int8"))
        model.graph.initializer.append(helper.make_tensor(layer.name + ending, TensorProto.FLOAT, [1], [1.0]))
        layer.input[draw.randrange(len(layer.input))] = layer.name + ending


def twice_the_node(model: onnx.ModelProto, draw: random.Random) -> None:
    model.graph.node.append(draw.choice(list(model.graph.node)))


def shuffled(model: onnx.ModelProto, draw: random.Random) -> None:
    nodes = list(model.graph.node)
    draw.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def twice_the_initializer(model: onnx.ModelProto, draw: random.Random) -> None:
    model.graph.initializer.append(_initializer(model, draw))


def initializer_name(model: onnx.ModelProto, draw: random.Random) -> None:
    _initializer(model, draw).name = _initializer(model, draw).name


def dimension(model: onnx.ModelProto, draw: random.Random) -> None:
    tensor = _initializer(model, draw)
    if tensor.dims:
        tensor.dims[draw.randrange(len(tensor.dims))] = draw.choice(SIZES)


def turned(model: onnx.ModelProto, draw: random.Random) -> None:
    """The same number of elements in another shape."""
    tensor = _initializer(model, draw)
    dims = list(reversed(tensor.dims)) if draw.random() < 0.5 else [*tensor.dims, 1]
    del tensor.dims[:]
    tensor.dims.extend(dims)


def element_type(model: onnx.ModelProto, draw: random.Random) -> None:
    _initializer(model, draw).data_type = draw.choice([*TensorProto.DataType.values(), 99, -3])


def place(model: onnx.ModelProto, draw: random.Random) -> None:
    tensors = [tensor for tensor in model.graph.initializer if tensor.external_data]
    if tensors:
        entry = draw.choice(list(draw.choice(tensors).external_data))
        values = ("../secret", "/etc/hostname", "config.json", "", "0", "1", "-8", str(2**63), "x", "4096", "²")
        entry.value = draw.choice(values)
        if draw.random() < 0.2:
            entry.key = draw.choice(("location", "offset", "length", "checksum"))


def no_place(model: onnx.ModelProto, draw: random.Random) -> None:
    tensor = _initializer(model, draw)
    if draw.random() < 0.5:
        del tensor.external_data[:]
    else:
        tensor.data_location = draw.choice((TensorProto.DEFAULT, TensorProto.EXTERNAL))
        tensor.raw_data = b"12345678"


def value_info(model: onnx.ModelProto, draw: random.Random) -> None:
    infos = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    tensor = draw.choice(infos).type.tensor_type
    if draw.random() < 0.3 or not tensor.shape.dim:
        tensor.elem_type = draw.choice([*TensorProto.DataType.values(), 99])
    else:
        tensor.shape.dim[draw.randrange(len(tensor.shape.dim))].dim_value = draw.choice(SIZES)


def no_type(model: onnx.ModelProto, draw: random.Random) -> None:
    draw.choice([*model.graph.input, *model.graph.output, *model.graph.value_info]).ClearField("type")


def graph_input(model: onnx.ModelProto, draw: random.Random) -> None:
    inputs = model.graph.input
    if draw.random() < 0.5:
        del inputs[draw.randrange(len(inputs))]
    else:
        draw.choice(list(inputs)).name = draw.choice(["", "x", model.graph.output[0].name])


def graph_output(model: onnx.ModelProto, draw: random.Random) -> None:
    draw.choice(list(model.graph.output)).name = draw.choice(["", "nowhere", model.graph.input[0].name])


def versions(model: onnx.ModelProto, draw: random.Random) -> None:
    if draw.random() < 0.3:
        model.ir_version = draw.choice((0, 1, 3, 99))
    elif draw.random() < 0.5 or not model.opset_import:
        del model.opset_import[:]
    else:
        draw.choice(list(model.opset_import)).version = draw.choice((-1, 0, 1, 7, 13, 999))


def recursion(model: onnx.ModelProto, draw: random.Random) -> None:
    """A function that calls itself."""
    for function in model.functions:
        function.opset_import.append(helper.make_opsetid("qe_edge", 1))
        function.node.append(NodeProto(op_type=function.name, domain=function.domain, input=function.input[:3]))
        function.node[-1].output.append("again")


def nested(model: onnx.ModelProto, draw: random.Random) -> None:
    """Graphs in graphs in graphs."""
    graph = helper.make_graph([], "inner", [], [])
    for _ in range(draw.choice((1, 10, 30))):
        other = helper.make_graph([], "other", [], [])
        node = helper.make_node("If", ["nowhere"], ["y"], then_branch=graph, else_branch=other)
        graph = helper.make_graph([node], "inner", [], [])
    model.graph.node.append(graph.node[0])


def empty(model: onnx.ModelProto, draw: random.Random) -> None:
    field = draw.choice(("graph", "opset_import", "functions"))
    model.ClearField(field)


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {"cut": _cut, "flip": _flip, "insert": _insert}
MUTATIONS: dict[str, Mutation] = {
    function.__name__: function
    for function in (
        drop_initializer, drop_node, drop_function, drop_input, empty_input, other_input, cycle, more_inputs,
        drop_output, drop_attribute, other_attribute, wrong_attribute_type, twice_the_attribute, other_operator,
        other_domain, same_name, no_name, clashing_name, twice_the_node, shuffled, twice_the_initializer,
        initializer_name, dimension, turned, element_type, place, no_place, value_info, no_type, graph_input,
        graph_output, versions, recursion, nested, empty,
    )
}  # fmt: skip
