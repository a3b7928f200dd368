"""Replaces `QELinear` nodes by standard operators, in the forms that a target fuses: here are TensorRT's.

TensorRT knows INT4 only with symmetric blocks and INT8 only through DequantizeLinear, so scales are repeated for
blocks, and zero points move out of the weight: `x @ ((q - z) s) = x @ (q s) - (sum of x over each group) @ (z s)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from qe_edge.export.lowering.passes import (
    InPlacePass,
    PassResult,
    ensure,
    linear_nodes,
    remove_unused,
    require_canonical,
)
from qe_edge.export.op import (
    DOMAIN,
    INPUTS,
    Attributes,
    Operands,
    Products,
    constant,
    initializer,
    linear_body,
    rank_table,
)
from qe_edge.numerics.grids import PER_CHANNEL
from qe_edge.system.errors import TargetError

BLOCKS = (128, 64, 32, 16)  # what TensorRT takes, best first
LARGE = 1 << 20  # numbers of an array that is not kept in memory
FLOAT32 = "float32"  # key in a node's meta: it must compute in float32


@dataclass(frozen=True)
class TensorRTProducts:
    """Bodies of one layer for TensorRT.

    Attributes:
        attributes: The node's attributes.
        block_size: Block of the INT4 weight.
        scales: `[K / block_size, N]`.
        offsets: `[K / g, N]`, zero points times scales, or None.
    """

    attributes: Attributes
    block_size: int
    scales: ir.Value
    offsets: ir.Value | None

    def main(self, ops: tape.Tape, x: ir.Value, operands: Operands) -> ir.Value:
        """Block-wise symmetric DequantizeLinear and MatMul; zero points act on sums of the input."""
        layout = {"axis": 0, "block_size": self.block_size}
        weight = ops.op("DequantizeLinear", [operands.qweight, self.scales], layout)
        y = ops.op("MatMul", [x, weight])
        if self.offsets is None:
            return y
        groups = shape_of(self.offsets)[0]
        split = ops.op("Reshape", [x, constant(ops, np.array([0, 0, groups, -1], np.int64))])
        sums = ops.op("ReduceSum", [split, constant(ops, np.array([-1], np.int64))], {"keepdims": 0})
        return ops.op("Sub", [y, ops.op("MatMul", [sums, self.offsets])])

    def factor(self, ops: tape.Tape, x: ir.Value, factor: ir.Value, scale: ir.Value | None) -> ir.Value:
        """INT8 factors are dequantized per column."""
        if scale is not None:
            factor = ops.op("DequantizeLinear", [factor, scale], {"axis": 1})
        return ops.op("MatMul", [x, factor])

    def rank_table(self, ops: tape.Tape, down: ir.Value) -> ir.Value:  # noqa: ARG002 - the sizes are known
        """A constant."""
        return rank_table(ops, self.attributes)


# From a graph and a layer's node, operands and attributes: the operands that its body reads, and its products.
Prepare = Callable[[ir.Graph, ir.Node, Operands, Attributes], tuple[Operands, Products]]


class InlineLayers(InPlacePass):
    """Replaces `QELinear` nodes by standard operators, and drops the functions.

    Requires a canonical graph; ensures that no node or function of our domain is left.

    Args:
        prepare: Says how a target multiplies a layer's weights; TensorRT by default.

    Attributes:
        names: Names of the layers that were replaced.

    Example:
        >>> import qe_edge, torch
        >>> from qe_edge.export.layers import layers_graph
        >>> layer = qe_edge.quantize_linear(torch.ones(32, 64), torch.ones(2, 64), qe_edge.make_recipe(method="rtn"))
        >>> model = layers_graph({"mlp.up": layer})
        >>> work = InlineLayers()
        >>> work(model).modified, work.names
        (True, ['mlp.up'])
    """

    def __init__(self, prepare: Prepare | None = None) -> None:
        super().__init__()
        self.names: list[str] = []
        self._prepare = prepare or _tensorrt_products

    def requires(self, model: ir.Model) -> None:
        """Operands of layers are initializers."""
        require_canonical(model)

    def call(self, model: ir.Model) -> PassResult:
        """Replace all of them.

        Raises:
            TargetError: If a layer's width fits no block.
        """
        for node in linear_nodes(model):
            self.names.append(node.name or "")
            _inline(model.graph, node, self._prepare)
        model.functions.clear()
        model.opset_imports.pop(DOMAIN, None)
        remove_unused(model)
        return PassResult(model, modified=bool(self.names))

    def ensures(self, model: ir.Model) -> None:
        """Nothing of our domain is left."""
        ensure(not linear_nodes(model), "No QELinear is left.")
        ensure(not model.functions, "No function is left.")


def inline_layers(model: ir.Model) -> list[str]:
    """Replace every `QELinear` node, in place; drops the functions. Returns the names of the layers.

    Nodes that must stay in float32 whatever the model's precision have `FLOAT32` in their meta: everything but the
    products with weights.

    Raises:
        TargetError: If a layer's width fits no block.

    Example:
        >>> import qe_edge, torch
        >>> from qe_edge.export.layers import layers_graph
        >>> layer = qe_edge.quantize_linear(torch.ones(32, 64), torch.ones(2, 64), qe_edge.make_recipe(method="rtn"))
        >>> model = layers_graph({"mlp.up": layer})
        >>> inline_layers(model), [node.op_type for node in model.graph][-2:]
        (['mlp.up'], ['DequantizeLinear', 'MatMul'])
    """
    work = InlineLayers()
    work(model)
    return work.names


def _inline(graph: ir.Graph, node: ir.Node, prepare: Prepare) -> None:
    """One layer in standard operators."""
    ops = tape.Tape()
    operands, attributes = without_neutral(operands_of(node), Attributes.of(node))
    operands, products = prepare(graph, node, operands, attributes)
    y = linear_body(ops, operands, attributes.act_bits, products)
    weights = {value for value in operands.values() if value is not None and value is not operands.router}
    for number, inner in enumerate(ops.nodes):
        inner.name = f"{node.name}/{inner.op_type}_{number}"
        inner.outputs[0].name = f"{inner.name}.output"
        if not _is_weight_product(inner, weights):
            inner.meta[FLOAT32] = True
    output = node.outputs[0]
    y.type, y.shape = output.type, output.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], ops.nodes, [output], [y])


def operands_of(node: ir.Node) -> Operands:
    """The inputs of a `QELinear` node by name.

    Example:
        >>> head = '<ir_version: 10, opset_import: ["": 21, "qe_edge": 1]> g (float x, float w, float s) => (float y)'
        >>> model = ir.from_onnx_text(head + "{ y = qe_edge.QELinear (x, w, s) }")
        >>> operands_of(model.graph[0]).present()
        ('x', 'qweight', 'scales')
    """
    return Operands(**dict(zip(INPUTS, node.inputs, strict=False)))  # type: ignore[arg-type] # x is never None


def without_neutral(operands: Operands, attributes: Attributes) -> tuple[Operands, Attributes]:
    """Leave out operands that the exporter added only so that all layers share one function.

    Example:
        >>> import qe_edge, torch
        >>> from qe_edge.export.layers import GraphForm, layer_attributes, layer_operands
        >>> layer = qe_edge.quantize_linear(torch.ones(32, 64), torch.ones(2, 64), qe_edge.make_recipe(method="rtn"))
        >>> form = replace(GraphForm.of([layer]), present=("x", "qweight", "scales", "bias"))  # another one has a bias
        >>> operands = layer_operands("mlp.up", ir.Value(name="x"), layer, form, owners={})
        >>> operands.present(), without_neutral(operands, layer_attributes(layer, form))[0].present()
        (('x', 'qweight', 'scales', 'bias'), ('x', 'qweight', 'scales'))
    """
    dropped: set[str] = set()
    for name, value in (("zeros", 0), ("inv_omega", 1), ("bias", 0), ("down", 0)):
        operand = getattr(operands, name)
        if operand is not None and not (array_of(operand).astype(np.float32) != value).any():
            dropped.add(name)
    if "down" in dropped:
        dropped |= {"up", "down_scale", "up_scale", "router"}
    if attributes.num_experts < 2:
        dropped.add("router")
    kept = {name: getattr(operands, name) for name in INPUTS if name not in dropped}
    return Operands(**kept), attributes


def array_of(value: ir.Value) -> np.ndarray:
    """Data of an initializer; INT4 comes as ml_dtypes.int4.

    Example:
        >>> graph = ir.Graph([], [], nodes=[])
        >>> array_of(add_initializer(graph, "bias", np.ones(3, np.float32)))
        array([1., 1., 1.], dtype=float32)
    """
    if value.const_value is None:
        raise ValueError(f"'{value.name}' is no initializer")
    array: np.ndarray = value.const_value.numpy()
    return array


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """Shape of an initializer.

    Example:
        >>> graph = ir.Graph([], [], nodes=[])
        >>> shape_of(add_initializer(graph, "weight", np.ones((3, 4), np.float32)))
        (3, 4)
    """
    if value.const_value is None:
        raise ValueError(f"'{value.name}' is no initializer")
    return tuple(value.const_value.shape.numpy())


def _tensorrt_products(
    graph: ir.Graph, node: ir.Node, operands: Operands, attributes: Attributes
) -> tuple[Operands, TensorRTProducts]:
    """Prepare scales and offsets of one layer as initializers.

    Raises:
        TargetError: If the layer's width fits no block.
    """
    operands = replace(operands, down=_widened(graph, operands.down), up=_widened(graph, operands.up))
    width = shape_of(operands.qweight)[0]
    group = width if attributes.group_size == PER_CHANNEL else attributes.group_size
    block = next((block for block in BLOCKS if width % block == 0 and group % block == 0), None)
    if block is None:
        raise TargetError(
            f"Layer '{node.name}' has {width} inputs in groups of {group}, which no block of TensorRT divides.",
            "Build the model for the target 'cpu', or leave this part of it unquantized.",
        )
    scales = array_of(operands.scales)
    repeated = add_initializer(graph, f"{node.name}.block_scales", np.repeat(scales, group // block, axis=0))
    offsets = None
    if operands.zeros is not None:
        zeros = array_of(operands.zeros).astype(np.float32)
        offsets = add_initializer(graph, f"{node.name}.offsets", zeros * scales)
    return operands, TensorRTProducts(attributes, block, repeated, offsets)


def _widened(graph: ir.Graph, factor: ir.Value | None) -> ir.Value | None:
    """An INT4 factor as INT8 of the same codes, because TensorRT reads INT4 only in blocks; others as they are."""
    if factor is None or factor.dtype != ir.DataType.INT4:
        return factor
    name = f"{factor.name}.int8"
    return graph.initializers.get(name) or add_initializer(graph, name, array_of(factor).astype(np.int8))


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new initializer of the graph.

    Example:
        >>> graph = ir.Graph([], [], nodes=[])
        >>> value = add_initializer(graph, "bias", np.ones(3, np.float32))
        >>> list(graph.initializers), value.dtype.name
        (['bias'], 'FLOAT')
    """
    value = initializer(name, ir.tensor(array))
    graph.register_initializer(value)
    return value


def add_when_written(
    graph: ir.Graph, name: str, make: Callable[[], np.ndarray], dtype: ir.DataType, shape: Sequence[int]
) -> ir.Value:
    """A new initializer of the graph; a large one is made when it is written, so that a model is not in memory twice.

    Args:
        graph: Receives it.
        name: Its name.
        make: Makes the array; called again whenever the array is asked for.
        dtype: The type of the array.
        shape: Its shape.

    Example:
        >>> graph = ir.Graph([], [], nodes=[])
        >>> shape = (2048, 512)
        >>> value = add_when_written(graph, "weight", lambda: np.ones(shape, np.int8), ir.DataType.INT8, shape)
        >>> type(value.const_value).__name__
        'LazyTensor'
    """
    if math.prod(shape) < LARGE:
        return add_initializer(graph, name, make())
    value = initializer(name, ir.LazyTensor(lambda: ir.tensor(make()), dtype=dtype, shape=ir.Shape(shape)))
    graph.register_initializer(value)
    return value


def _is_weight_product(node: ir.Node, weights: set[ir.Value]) -> bool:
    """Whether a node multiplies or decodes weights: those compute in the model's precision."""
    if node.op_type == "DequantizeLinear":
        return True
    if node.op_type != "MatMul" or node.inputs[1] is None:
        return False
    producer = node.inputs[1].producer()
    return producer is not None or node.inputs[1] in weights or (node.inputs[1].name or "").endswith(".offsets")
