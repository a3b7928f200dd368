"""The body of `com.microsoft::GroupQueryAttention`, as language graphs use it, in standard operators.

ONNX Runtime computes the node itself and never reads the function. Lowerings for other targets, and models whose masks
the node cannot express, have the body in the node's place.

A node that reads the keys and values of an earlier layer gets none to write: those inputs have no tokens, the node has
one output, and its function is an overload.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from qe_edge.export.lowering.passes import remove_unused
from qe_edge.export.op import OPSET, constant, real_constant, reference
from qe_edge.models.cached_attention import DOMAIN, EXPANDED, NAME, VERSION

INPUTS = ("query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length")
NUMBERS = ("num_heads", "kv_num_heads", "local_window_size")
REALS = ("scale", "softcap")
LOWEST = float(np.finfo(np.float32).min)  # instead of -inf: rows of padding stay finite
READS = "reads"  # overload of nodes that write nothing
SCATTER_OPSET = 24  # the first with TensorScatter

Write = Literal["ScatterND", "TensorScatter"]  # how new keys and values come into the cache: a copy of it, or in place


@dataclass
class Places:
    """Values that all layers of a graph share: the places of the new tokens, and the tokens that they see.

    Attributes:
        start: Place of a row's first new token, `[batch]` int64.
        query: Places of the new tokens, `[batch, sequence, 1]`.
        key: Places of the cache, `[total]`.
        total: `[1]` int64.
        pictures: Numbers of pictures at the new tokens `[batch, sequence, 1]` and in the cache `[batch, 1, total]`.
        indices: By number of heads `[batch, kv_heads, sequence, 3]` of ScatterND.
        masks: Additive masks `[batch, 1, sequence, total]` by window, and by whether pictures count.
    """

    start: ir.Value
    query: ir.Value
    key: ir.Value
    total: ir.Value
    pictures: tuple[ir.Value, ir.Value] | None = None
    indices: dict[int | None, ir.Value] = field(default_factory=dict)
    masks: dict[tuple[int | None, bool], ir.Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Numbers:
    """A node's attributes as values: int64 `[1]` and float32 scalars; a window or cap that a node lacks is None.

    Attributes:
        heads: Heads of queries.
        kv_heads: Heads of keys and values.
        scale: Factor on the scores.
        softcap: Bound of the scores.
        window: Tokens that a token sees, its own included.
        key: Stands for the window, where it is known.
        kv_key: Stands for the number of heads of keys and values, where it is known.
        pictures: Whether the tokens of a picture see each other.
    """

    heads: ir.Value
    kv_heads: ir.Value
    scale: ir.Value
    softcap: ir.Value | None
    window: ir.Value | None
    key: int | None = None
    kv_key: int | None = None
    pictures: bool = False


def attach_cached_attention(model: ir.Model) -> None:
    """Give a traced graph the function that defines its nodes; nodes without a kernel are expanded.

    Example:
        >>> tokens = "float[1, 1, 8] q, float[1, 1, 8] k, float[1, 1, 8] v, int32[1] last, int32 total"
        >>> cache, results = "float[1, 1, 16, 8] pk, float[1, 1, 16, 8] pv", "float[1, 1, 8] y, float nk, float nv"
        >>> numbers = "num_heads: int = 1, kv_num_heads: int = 1, local_window_size: int = -1"
        >>> reals = "scale: float = 1.0, softcap: float = 0.0"
        >>> node = f"y, nk, nv = com.microsoft.GroupQueryAttention <{numbers}, {reals}> (q, k, v, pk, pv, last, total)"
        >>> head = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>'
        >>> model = ir.from_onnx_text(f"{head} g ({tokens}, {cache}) => ({results}) {{ {node} }}")
        >>> attach_cached_attention(model)
        >>> list(model.functions)
        [('com.microsoft', 'GroupQueryAttention', '')]
    """
    expand_cached_attention(model, [node for node in cached_attention_nodes(model) if EXPANDED in node.attributes])
    for node in cached_attention_nodes(model):
        node.overload = "" if writes(node) else READS
        if node.op_identifier() not in model.functions:
            model.functions[node.op_identifier()] = _function(node.overload)
        model.opset_imports[DOMAIN] = VERSION


def cached_attention_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes of a graph, in its order.

    Example:
        >>> text = '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) { y = Gelu (x) }'
        >>> cached_attention_nodes(ir.from_onnx_text(text))
        []
    """
    return [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, NAME)]


def writes(node: ir.Node) -> bool:
    """Whether a node writes keys and values, and does not read those of an earlier layer.

    Example:
        >>> writes(ir.node("GroupQueryAttention", [], num_outputs=3))
        True
    """
    return len(node.outputs) > 1


def expand_cached_attention(
    model: ir.Model, nodes: Iterable[ir.Node] | None = None, write: Write = "ScatterND"
) -> None:
    """Replace nodes, all by default, by their bodies, in place.

    Args:
        model: A canonical graph.
        nodes: The nodes to replace; None for all.
        write: The operator that writes new keys and values into the cache.

    Example:
        >>> tokens = "float[1, 1, 8] q, float[1, 1, 8] k, float[1, 1, 8] v, int32[1] last, int32 total"
        >>> cache, results = "float[1, 1, 16, 8] pk, float[1, 1, 16, 8] pv", "float[1, 1, 8] y, float nk, float nv"
        >>> numbers = "num_heads: int = 1, kv_num_heads: int = 1, local_window_size: int = -1"
        >>> reals = "scale: float = 1.0, softcap: float = 0.0"
        >>> node = f"y, nk, nv = com.microsoft.GroupQueryAttention <{numbers}, {reals}> (q, k, v, pk, pv, last, total)"
        >>> head = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>'
        >>> model = ir.from_onnx_text(f"{head} g ({tokens}, {cache}) => ({results}) {{ {node} }}")
        >>> expand_cached_attention(model, write="TensorScatter")
        >>> sum(each.op_type == "TensorScatter" for each in model.graph)  # keys and values
        2
    """
    places: Places | None = None
    for node in cached_attention_nodes(model) if nodes is None else nodes:
        ops = tape.Tape()
        given = [value for value in node.inputs if value is not None]
        if len(given) < len(INPUTS):
            raise ValueError(f"node {node.name} lacks an input")
        if places is None:
            places = _places(ops, given)
        if len(given) > len(INPUTS) and places.pictures is None:
            places.pictures = _pictures(ops, given[len(INPUTS)], places)
        results = _body(ops, given, _numbers(ops, node), places, write if writes(node) else None)[: len(node.outputs)]
        for number, inner in enumerate(ops.nodes):
            inner.name = f"{node.name}/{inner.op_type}_{number}"
            inner.outputs[0].name = f"{inner.name}.output"
        for output, result in zip(node.outputs, results, strict=True):
            result.type, result.shape = output.type, output.shape
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], ops.nodes, node.outputs, results)
    if places is not None:
        remove_unused(model)
    if places is not None and not cached_attention_nodes(model):
        for overload in ("", READS):
            model.functions.pop((DOMAIN, NAME, overload), None)
        model.opset_imports.pop(DOMAIN, None)
    if places is not None and write == "TensorScatter":
        model.opset_imports[""] = SCATTER_OPSET


def _numbers(ops: tape.Tape, node: ir.Node) -> Numbers:
    heads, kv_heads, window = (node.attributes[name].as_int() for name in NUMBERS)
    scale, softcap = (node.attributes[name].as_float() for name in REALS)
    return Numbers(
        heads=constant(ops, np.array([heads], np.int64)),
        kv_heads=constant(ops, np.array([kv_heads], np.int64)),
        scale=real_constant(ops, scale),
        softcap=real_constant(ops, softcap) if softcap else None,
        window=constant(ops, np.array([window], np.int64)) if window > 0 else None,
        key=window if window > 0 else None,
        kv_key=kv_heads,
        pictures=len(node.inputs) > len(INPUTS),
    )


def _function(overload: str) -> ir.Function:
    """For any number of heads, any scale, window and cap, which are the node's attributes."""
    values = [ir.Value(name=name) for name in INPUTS]
    ops = tape.Tape()
    zero = _whole(ops, 0)
    heads, kv_heads, window = (
        ops.op("Unsqueeze", [ops.op("Constant", [], {"value_int": reference("value_int", name)}), zero])
        for name in NUMBERS
    )
    scale, softcap = (
        ops.op("Constant", [], {"value_float": ir.RefAttr("value_float", name, ir.AttributeType.FLOAT)})
        for name in REALS
    )
    capped = ops.op("Where", [ops.op("Greater", [softcap, real_constant(ops, 0)]), softcap, real_constant(ops, 1e9)])
    near = ops.op("Where", [ops.op("Greater", [window, zero]), window, _whole(ops, 1 << 40)])
    numbers = Numbers(heads, kv_heads, scale, capped, near)
    write: Write | None = None if overload == READS else "ScatterND"
    results = _body(ops, values, numbers, _places(ops, values), write)[: 1 if write is None else 3]
    for name, result in zip(("output", "present_key", "present_value"), results, strict=False):
        result.name = name
    graph = ir.Graph(values, results, nodes=ops.nodes, opset_imports={"": OPSET}, name=NAME)
    declared = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in (*NUMBERS, *REALS)]
    return ir.Function(DOMAIN, NAME, overload, graph=graph, attributes=declared)


def _places(ops: tape.Tape, inputs: list[ir.Value]) -> Places:
    """The places of a row's new tokens: they are its last ones, or all of them."""
    query, last, total = inputs[0], inputs[5], inputs[6]
    zero, one, sequence = _whole(ops, 0), _whole(ops, 1), ops.op("Shape", [query], {"start": 1, "end": 2})
    length = ops.op("Add", [_int64(ops, last), one])
    start = ops.op("Max", [ops.op("Sub", [length, sequence]), zero])
    steps = ops.op("Range", [_scalar(ops, zero), _scalar(ops, sequence), _scalar(ops, one)])
    tokens = ops.op("Add", [ops.op("Unsqueeze", [start, one]), steps])
    total = _int64(ops, total)
    key = ops.op("Range", [_scalar(ops, zero), _scalar(ops, total), _scalar(ops, one)])
    return Places(start, ops.op("Unsqueeze", [tokens, _whole(ops, 2)]), key, total)


def _pictures(ops: tape.Tape, numbers: ir.Value, places: Places) -> tuple[ir.Value, ir.Value]:
    """Numbers of pictures at the new tokens, and in the cache."""
    tokens = ops.op("Squeeze", [places.query, _whole(ops, 2)])
    own = ops.op("GatherElements", [numbers, tokens], {"axis": 1})
    return ops.op("Unsqueeze", [own, _whole(ops, 2)]), ops.op("Unsqueeze", [numbers, _whole(ops, 1)])


def _body(
    ops: tape.Tape, inputs: list[ir.Value], numbers: Numbers, places: Places, write: Write | None
) -> list[ir.Value]:
    """Mixed values `[batch, sequence, heads * head_dim]`, keys and values with the new ones written in.

    Where `write` is None the cache has them already: an earlier layer wrote them.
    """
    kept, rest, width = _whole(ops, 0, 0), _whole(ops, -1), ops.op("Shape", [inputs[3]], {"start": 3})
    parted = []
    for value, heads in zip(inputs[:3], (numbers.heads, numbers.kv_heads, numbers.kv_heads), strict=True):
        split = ops.op("Reshape", [value, ops.op("Concat", [kept, heads, rest], {"axis": 0})])
        parted.append(ops.op("Transpose", [split], {"perm": [0, 2, 1, 3]}))
    query, *new = parted
    present = list(inputs[3:5])
    if write is not None:
        present = [_written(ops, past, part, numbers, places, write) for past, part in zip(present, new, strict=True)]
    one = _whole(ops, 1)
    group = ops.op("Concat", [one, one, ops.op("Div", [numbers.heads, numbers.kv_heads]), one, one], {"axis": 0})
    joined = ops.op("Concat", [_whole(ops, 0), numbers.heads, rest, width], {"axis": 0})
    key, value = (
        # what every group of query heads shares
        ops.op("Reshape", [ops.op("Expand", [ops.op("Unsqueeze", [used, _whole(ops, 2)]), group]), joined])
        for used in (ops.op("Slice", [part, _whole(ops, 0), places.total, _whole(ops, 2)]) for part in present)
    )
    scores = ops.op("MatMul", [query, ops.op("Transpose", [key], {"perm": [0, 1, 3, 2]})])
    scores = ops.op("Mul", [scores, numbers.scale])
    if numbers.softcap is not None:
        scores = ops.op("Mul", [ops.op("Tanh", [ops.op("Div", [scores, numbers.softcap])]), numbers.softcap])
    scores = ops.op("Add", [scores, _mask(ops, numbers, places)])
    mixed = ops.op("MatMul", [ops.op("Softmax", [scores], {"axis": -1}), value])
    flat = constant(ops, np.array([0, 0, -1], np.int64))
    return [ops.op("Reshape", [ops.op("Transpose", [mixed], {"perm": [0, 2, 1, 3]}), flat]), *present]


def _written(ops: tape.Tape, past: ir.Value, new: ir.Value, numbers: Numbers, places: Places, write: Write) -> ir.Value:
    """The cache `[batch, kv_heads, capacity, head_dim]` with `new` `[batch, kv_heads, sequence, head_dim]` in it."""
    if write == "TensorScatter":
        return ops.op("TensorScatter", [past, new, places.start], {"axis": -2, "mode": "linear"})
    if numbers.kv_key not in places.indices:
        zero, one, last = _whole(ops, 0), _whole(ops, 1), _whole(ops, -1)
        rows = ops.op("Shape", [past], {"start": 0, "end": 1})
        tokens = ops.op("Shape", [places.query], {"start": 1, "end": 2})
        shape = ops.op("Concat", [rows, numbers.kv_heads, tokens, one], {"axis": 0})
        row, head = (
            ops.op("Range", [_scalar(ops, zero), _scalar(ops, count), _scalar(ops, one)])
            for count in (rows, numbers.kv_heads)
        )
        columns = (
            ops.op("Reshape", [row, ops.op("Concat", [last, one, one, one], {"axis": 0})]),
            ops.op("Reshape", [head, ops.op("Concat", [one, last, one, one], {"axis": 0})]),
            ops.op("Unsqueeze", [places.query, one]),
        )
        places.indices[numbers.kv_key] = ops.op(
            "Concat", [ops.op("Expand", [part, shape]) for part in columns], {"axis": -1}
        )
    return ops.op("ScatterND", [past, places.indices[numbers.kv_key], new])


def _mask(ops: tape.Tape, numbers: Numbers, places: Places) -> ir.Value:
    """0 where a new token sees a place of the cache, the lowest number elsewhere."""
    kind = (numbers.key, numbers.pictures)
    if kind in places.masks:
        return places.masks[kind]
    seen = ops.op("LessOrEqual", [places.key, places.query])
    if numbers.pictures and places.pictures is not None:
        own, numbered = places.pictures
        same = ops.op("And", [ops.op("Equal", [own, numbered]), ops.op("Greater", [own, _whole(ops, 1)])])
        seen = ops.op("Or", [seen, same])
    if numbers.window is not None:
        near = ops.op("Greater", [places.key, ops.op("Sub", [places.query, numbers.window])])
        seen = ops.op("And", [seen, near])
    mask = ops.op("Where", [seen, real_constant(ops, 0), real_constant(ops, LOWEST)])
    places.masks[kind] = ops.op("Unsqueeze", [mask, _whole(ops, 1)])
    return places.masks[kind]


def _whole(ops: tape.Tape, *numbers: int) -> ir.Value:
    return constant(ops, np.array(numbers, np.int64))


def _scalar(ops: tape.Tape, value: ir.Value) -> ir.Value:
    """An int64 `[1]` as a scalar."""
    return ops.op("Squeeze", [value])


def _int64(ops: tape.Tape, value: ir.Value) -> ir.Value:
    return ops.op("Cast", [value], {"to": ir.DataType.INT64.value})
