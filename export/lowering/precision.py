"""float16 for most of the arithmetic, float32 for values of a large range.

Products with weights run in float16. Nodes that add or multiply two activations run in float32, so that the residual
stream and the gates of MLPs cannot overflow: real models exceed float16 there. So do the statistics of norms, rotary
angles, the router's scores and the rounding of activations, and what layers keep as states. Keys and values are
float16; all other inputs and outputs are float32.
"""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir

from qe_edge.export.lowering.inline import FLOAT32, add_initializer, add_when_written, array_of
from qe_edge.export.lowering.passes import InPlacePass, PassResult, ensure, remove_unused, require, untyped_values
from qe_edge.export.lowering.plugin import is_packed
from qe_edge.export.lowering.states import WEIGHTED, is_state_tensor, state_nodes
from qe_edge.runtime.cache_tensors import PAST, PRESENT

HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT
FLOATS = (HALF, SINGLE)
PRODUCTS = ("Conv", *WEIGHTED)
STATISTICS = (
    "Cos", "Exp", "Erf", "LayerNormalization", "Pow", "Reciprocal", "ReduceMean", "ReduceSum", "Sin", "Sqrt", "Tanh",
)  # fmt: skip
COMBINING = ("Add", "Sub", "Mul", "Div")
MASKED = -3e4  # a masked score in float16: far below any other, and its sum with one is finite


class ScaleQueries(InPlacePass):
    """Moves factors of attention scores to the queries. Requires and ensures that results have types.

    Example:
        >>> text = '<ir_version: 10, opset_import: ["": 21]> g (float[2, 4] x) => (float[2, 4] y) { y = Abs (x) }'
        >>> ScaleQueries()(ir.from_onnx_text(text)).modified
        True
    """

    def requires(self, model: ir.Model) -> None:
        """Results have types: the new nodes take the types of the queries."""
        require(not untyped_values(model.graph), "Every result has a type.")

    def call(self, model: ir.Model) -> PassResult:
        """Move all of them."""
        _scale(model)
        return PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Results have types."""
        ensure(not untyped_values(model.graph), "Every result has a type.")


class ToHalf(InPlacePass):
    """Chooses float16 or float32 for every node.

    Requires that results have types. Ensures that inputs and outputs are float32, except keys and values, which are
    float16.

    Attributes:
        precision: Precision of every node that computes with floats, by name.

    Example:
        >>> text = '<ir_version: 10, opset_import: ["": 21]> g (float[2, 4] x, float[4, 4] w) => (float[2, 4] y)'
        >>> model = ir.from_onnx_text(text + "{ y = MatMul (x, w) }")
        >>> model.graph[0].name = "mlp.up"
        >>> work = ToHalf()
        >>> _ = work(model)
        >>> work.precision, [node.op_type for node in model.graph]
        ({'mlp.up': 'float16'}, ['Cast', 'Cast', 'MatMul', 'Cast'])
    """

    def __init__(self) -> None:
        super().__init__()
        self.precision: dict[str, str] = {}

    def requires(self, model: ir.Model) -> None:
        """Results have types."""
        require(not untyped_values(model.graph), "Every result has a type.")

    def call(self, model: ir.Model) -> PassResult:
        """Convert the graph."""
        conversion = _Conversion(model.graph)
        for node in list(model.graph):
            conversion.convert(node)
        conversion.finish()
        remove_unused(model)
        self.precision = conversion.precision
        return PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Inputs and outputs have their types."""
        for value in (*model.graph.inputs, *model.graph.outputs):
            wanted = _outer(value)
            ensure(value.dtype not in FLOATS or value.dtype == wanted, f"'{value.name}' is {wanted.name}.")


def scale_queries(model: ir.Model) -> None:
    """Move the constant factor on attention scores to the queries: the bare product can exceed float16.

    Example:
        >>> from onnx_ir.passes.common import ShapeInferencePass
        >>> text = '<ir_version: 10, opset_import: ["": 21]> g (float[2, 4] q, float[4, 2] k) => (float[2, 2] y)'
        >>> nodes = "{ c = Constant <value = float {0.5}> ()  p = MatMul (q, k)  y = Mul (p, c) }"
        >>> model = ir.from_onnx_text(text + nodes)
        >>> _ = ShapeInferencePass()(model)
        >>> scale_queries(model)
        >>> [node.op_type for node in model.graph]  # the product of the scaled queries
        ['Constant', 'Mul', 'MatMul']
    """
    ScaleQueries()(model)


def _scale(model: ir.Model) -> None:
    for node in list(model.graph):
        if node.op_type != "Mul":
            continue
        for product, factor in itertools.permutations(node.inputs):
            producer = product.producer() if product is not None else None
            if product is None or producer is None or producer.op_type != "MatMul":
                continue
            if factor is None or not _is_scalar(factor):
                continue
            query = producer.inputs[0]
            if query is None or producer.inputs[1] is None or _is_constant(producer.inputs[1]):
                continue
            scaled = ir.node("Mul", [query, factor], name=f"{node.name}/query")
            scaled.outputs[0].name = f"{node.name}.query"
            scaled.outputs[0].type, scaled.outputs[0].shape = query.type, query.shape
            model.graph.insert_before(producer, scaled)
            producer.replace_input_with(0, scaled.outputs[0])
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], [], node.outputs, [product])
            break


def to_half(model: ir.Model) -> dict[str, str]:
    """Convert a float32 graph in place; returns the precision of every node that computes with floats.

    Args:
        model: A graph of standard operators, INT4 and INT8 weights behind DequantizeLinear.

    Example:
        >>> text = '<ir_version: 10, opset_import: ["": 21]> g (float[2, 4] x, float[4, 4] w) => (float[2, 4] y)'
        >>> model = ir.from_onnx_text(text + "{ y = MatMul (x, w) }")
        >>> model.graph[0].name = "mlp.up"
        >>> to_half(model), model.graph.outputs[0].dtype.name
        ({'mlp.up': 'float16'}, 'FLOAT')
    """
    work = ToHalf()
    work(model)
    return work.precision


class _Conversion:
    """One pass over a graph in topological order."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.precision: dict[str, str] = {}
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._exact = _angle_nodes(graph) | state_nodes(graph)
        for value in graph.inputs:
            if value.dtype == SINGLE and _outer(value) == HALF:
                value.type = ir.TensorType(HALF)

    def convert(self, node: ir.Node) -> None:
        """Choose a node's precision and cast its inputs to it."""
        if node.op_type == "Constant":
            return  # its users take it in the precision that they want
        if node.op_type == "Cast" or not any(value.dtype in FLOATS for value in node.outputs if value.dtype):
            self._constants_follow(node)
            return
        wanted = self._choose(node)
        self.precision[node.name or ""] = "float16" if wanted == HALF else "float32"
        inputs = node.inputs[:1] if is_packed(node) else node.inputs  # packed weights have the types of its kernels
        for index, value in enumerate(inputs):
            if value is not None and _is_float(value):
                node.replace_input_with(index, self._as(value, wanted, node))
        for output in node.outputs:
            if output.dtype in FLOATS:
                output.type = ir.TensorType(wanted)  # types may be shared between values

    def finish(self) -> None:
        """Bring the outputs to their types."""
        for index, value in enumerate(self.graph.outputs):
            if value.dtype not in FLOATS:
                continue
            wanted = _outer(value)
            if value.dtype != wanted:
                name = value.name
                value.name = f"{name}.uncast"
                cast = _cast(value, wanted, f"{name}/Cast")
                cast.outputs[0].name = name
                self.graph.append(cast)
                self.graph.outputs[index] = cast.outputs[0]

    def _choose(self, node: ir.Node) -> ir.DataType:
        if node in self._exact or node.op_type in STATISTICS or FLOAT32 in node.meta:
            return SINGLE
        if node.op_type in PRODUCTS:
            return HALF
        activations = [value for value in node.inputs if value is not None and _is_float(value) and not _is_free(value)]
        if not activations:
            return HALF  # made of constants only, such as the attention mask
        if node.op_type in COMBINING and len(activations) > 1:
            return SINGLE
        return HALF if any(value.dtype == HALF for value in activations) else SINGLE

    def _constants_follow(self, node: ir.Node) -> None:
        """A node that gives no floats takes them in one precision."""
        floats = [value for value in node.inputs if value is not None and _is_float(value)]
        if len(floats) < 2:
            return
        for index, value in enumerate(node.inputs):
            if value is not None and _is_float(value):
                node.replace_input_with(index, self._as(value, SINGLE, node))

    def _as(self, value: ir.Value, dtype: ir.DataType, node: ir.Node) -> ir.Value:
        """`value` in `dtype`: itself, a converted constant, or a cast."""
        if value.dtype == dtype:
            return value
        key = (value, dtype)
        if key not in self._casts:
            suffix = "half" if dtype == HALF else "single"
            if _is_constant(value):
                self._casts[key] = _converted(self.graph, value, dtype, f"{value.name}.{suffix}")
            else:
                cast = _cast(value, dtype, f"{value.name}/{suffix}")
                self.graph.insert_before(node, cast)
                self._casts[key] = cast.outputs[0]
        return self._casts[key]


def convert_constant(array: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    """A constant in another precision; a masking constant becomes a number that float16 can add to.

    Example:
        >>> mask = np.array([0.0, -3.4e38, 70000.0], np.float32)
        >>> convert_constant(mask, HALF)
        array([ 0.00e+00, -3.00e+04,  6.55e+04], dtype=float16)
    """
    if dtype == SINGLE:
        return array.astype(np.float32)
    limit = float(np.finfo(np.float16).max)
    return np.where(array < -limit, MASKED, np.clip(array, -limit, limit)).astype(np.float16)


def array_of_constant(value: ir.Value) -> np.ndarray:
    """Data of an initializer or of a Constant node.

    Example:
        >>> text = '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y)'
        >>> model = ir.from_onnx_text(text + "{ c = Constant <value = float {0.5}> ()  y = Mul (x, c) }")
        >>> array_of_constant(model.graph[1].inputs[1]).item()
        0.5
    """
    producer = value.producer()
    if producer is None:
        return array_of(value)
    array: np.ndarray = producer.attributes["value"].as_tensor().numpy()
    return array


def _converted(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
    """A constant in another precision, as an initializer."""
    stored = value.const_value
    if stored is None:
        return add_initializer(graph, name, convert_constant(array_of_constant(value), dtype))
    return add_when_written(graph, name, lambda: convert_constant(stored.numpy(), dtype), dtype, stored.shape.numpy())


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": dtype.value}, name=name)
    node.outputs[0].name = f"{name}.output"
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), value.shape
    return node


def _outer(value: ir.Value) -> ir.DataType:
    """Type of an input or output that holds floats."""
    return HALF if (value.name or "").startswith((PAST, PRESENT)) and not is_state_tensor(value.name) else SINGLE


def _is_float(value: ir.Value) -> bool:
    if value.dtype is None:
        raise ValueError(f"value '{value.name}' has no type")
    return value.dtype in FLOATS


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    return value.is_initializer() or (producer is not None and producer.op_type == "Constant")


def _is_scalar(value: ir.Value) -> bool:
    return _is_constant(value) and array_of_constant(value).size == 1


def _is_free(value: ir.Value) -> bool:
    """Whether a value holds constants only, or a choice between constants."""
    producer = value.producer()
    if _is_constant(value):
        return True
    if producer is None or producer.op_type not in ("Where", "Expand", "Unsqueeze", "Reshape", "Slice"):
        return False
    floats = [source for source in producer.inputs if source is not None and _is_float(source)]
    return all(_is_free(source) for source in floats)


def _angle_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Nodes whose result goes into a sine or cosine: positions times frequencies are large and must be exact."""
    pending = [node for node in graph if node.op_type in ("Sin", "Cos")]
    found: set[ir.Node] = set()
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            producers = (value.producer() for value in node.inputs if value is not None)
            pending += [producer for producer in producers if producer is not None]
    return found
