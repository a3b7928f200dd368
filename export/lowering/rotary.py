"""Makes one node of a query's or key's rotary embedding, as ONNX Runtime computes it.

An exported graph computes cosines and sines once for all layers, and applies them in ten small nodes a layer to the
queries and in ten to the keys. `com.microsoft::RotaryEmbedding` reads them from a table with one row for every new
token, so that any rope fits that turns the two halves of a head, M-RoPE too.

The attention node could rotate by itself. It does not look at the positions of a first prompt, though: it takes the
same rows for every row of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir import tape

from qe_edge.export.cached_attention import INPUTS, cached_attention_nodes
from qe_edge.export.lowering.passes import InPlacePass, PassResult, ensure, remove_unused
from qe_edge.export.lowering.patterns import made_from, maker, number_of
from qe_edge.export.op import constant
from qe_edge.runtime.sessions import ort_errors

NAME = "RotaryEmbedding"
POSITIONS = "position_ids"  # the graph's input
MOST = 1 << 16  # positions that are tried
SWAPPED = [0, 2, 1, 3]  # [batch, sequence, heads, width] to [batch, heads, sequence, width], and back


@dataclass(frozen=True)
class _Rotated:
    """A query or key before its rotation.

    Attributes:
        source: `[batch, sequence, heads * width]`, or with an axis for heads where a norm comes between.
        cosine: `[batch, sequence, width]`.
        sine: Likewise.
    """

    source: ir.Value
    cosine: ir.Value
    sine: ir.Value


@dataclass(frozen=True)
class _Tables:
    """Cosines and sines with a row a token, `[tokens, width / 2]`, and every token's row, `[batch, sequence]`."""

    cosines: ir.Value
    sines: ir.Value
    rows: ir.Value


class FuseRotary(InPlacePass):
    """Replaces the rotations of attention nodes' queries and keys. Other nodes stay as they are.

    Ensures that no rotation that it knows is left.

    Attributes:
        fused: How many attention nodes read such queries and keys now.

    Example:
        `work = FuseRotary()`, then `work(model)` on a graph that `qe-edge export` wrote; `work.fused` is its number of
        decoder layers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fused = 0
        self._tables: dict[tuple[ir.Value, ir.Value], _Tables] = {}

    def call(self, model: ir.Model) -> PassResult:
        """Replace all of them."""
        for node, query, key in list(_rotated_nodes(model)):
            self._rotate(model.graph, node, 0, query, "num_heads")
            self._rotate(model.graph, node, 1, key, "kv_num_heads")
            node.replace_input_with(2, _flat(node.inputs[2]) or node.inputs[2])
            self.fused += 1
        remove_unused(model)
        return PassResult(model, modified=bool(self.fused))

    def ensures(self, model: ir.Model) -> None:
        """No rotation that the pass knows is left."""
        ensure(not list(_rotated_nodes(model)), "No rotation of a known form is left.")

    def _rotate(self, graph: ir.Graph, node: ir.Node, place: int, rotated: _Rotated, heads: str) -> None:
        """Give an attention node an input that one node rotates."""
        tables, replaced = self._tables_of(graph, node, rotated), node.inputs[place]
        ops, source = tape.Tape(), rotated.source
        if source.shape is None or len(source.shape) != 3:
            source = ops.op("Reshape", [source, _whole(ops, 0, 0, -1)])
        output = ops.op(
            NAME,
            [source, tables.rows, tables.cosines, tables.sines],
            {"num_heads": node.attributes[heads].as_int()},
            domain=node.domain,
        )
        _name(ops, f"{node.name}/rotary_{place}")
        if replaced is not None:
            output.type, output.shape = replaced.type, replaced.shape
        graph.insert_before(node, ops.nodes)
        node.replace_input_with(place, output)

    def _tables_of(self, graph: ir.Graph, node: ir.Node, rotated: _Rotated) -> _Tables:
        """What all layers with the same angles share."""
        pair = (rotated.cosine, rotated.sine)
        if pair not in self._tables:
            ops = tape.Tape()
            cosines, sines = (_half(ops, angles) for angles in pair)
            sizes = ops.op("Shape", [rotated.source], {"start": 0, "end": 2})
            tokens = ops.op("ReduceProd", [sizes], {"keepdims": 0})
            zero, one = (constant(ops, np.array(number, np.int64)) for number in (0, 1))
            rows = ops.op("Reshape", [ops.op("Range", [zero, tokens, one]), sizes])
            _name(ops, f"rotary_{len(self._tables)}")
            graph.insert_before(node, ops.nodes)
            self._tables[pair] = _Tables(cosines, sines, rows)
        return self._tables[pair]


def _rotated_nodes(model: ir.Model) -> Iterator[tuple[ir.Node, _Rotated, _Rotated]]:
    """Attention nodes whose query and key are rotations of a known form, with what was rotated."""
    fits: dict[ir.Value, bool] = {}
    for node in cached_attention_nodes(model):
        query, key = _rotation(node.inputs[0]), _rotation(node.inputs[1])
        if len(node.inputs) != len(INPUTS) or query is None or key is None:
            continue
        angles = {query.cosine, query.sine, key.cosine, key.sine}
        fits |= {value: _repeats(model, value) for value in angles - fits.keys()}
        if all(fits[value] for value in angles):
            yield node, query, key


def _repeats(model: ir.Model, angles: ir.Value) -> bool:
    """Whether the second half of cosines or sines is the first one once more, which the node takes for granted.

    They are computed for some positions. Those that depend on anything else are not known.
    """
    positions = next((value for value in model.graph.inputs if value.name == POSITIONS), None)
    if positions is None or positions.shape is None:
        return False
    shape = tuple(size if isinstance(size, int) else 3 for size in positions.shape)
    if math.prod(shape) > MOST:
        return False
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        part = ir.convenience.extract(model.graph, [positions], [angles])
        file = ir.to_proto(ir.Model(part, ir_version=model.ir_version)).SerializeToString()
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        numbers = np.random.default_rng(0).integers(0, 1000, shape)
        found = np.asarray(session.run(None, {POSITIONS: numbers})[0])
    except ort_errors():  # ValueError too, where the angles depend on anything else
        return False
    half = found.shape[-1] // 2
    return np.array_equal(found[..., :half], found[..., half:])


def _half(ops: tape.Tape, angles: ir.Value) -> ir.Value:
    """The first half of every row, which the second one repeats, `[batch * sequence, width / 2]`."""
    width = _width(angles)
    half = ops.op("Slice", [angles, _whole(ops, 0), _whole(ops, width // 2), _whole(ops, 2)])
    return ops.op("Reshape", [half, _whole(ops, -1, width // 2)])


def _width(value: ir.Value) -> int:
    """The last size of a value, 0 where it is not known."""
    width = None if value.shape is None else value.shape[-1]
    return width if isinstance(width, int) else 0


def _rotation(value: ir.Value | None) -> _Rotated | None:
    """What `Reshape(Transpose(x * cos + rotate_half(x) * sin))` was made of."""
    added = maker(made_from(made_from(value, "Reshape"), "Transpose", SWAPPED), "Add")
    if added is None:
        return None
    straight, turned = (maker(part, "Mul") for part in added.inputs)
    if straight is None or turned is None:
        return None
    x, cosine = straight.inputs
    angles = [made_from(part, "Unsqueeze") for part in (cosine, turned.inputs[1])]
    parted = made_from(x, "Transpose", SWAPPED)
    source = _flat_heads(parted) or parted
    if source is None or angles[0] is None or angles[1] is None or not _turns(turned.inputs[0], x, angles[0]):
        return None
    return _Rotated(source, angles[0], angles[1])


def _turns(value: ir.Value | None, x: ir.Value | None, angles: ir.Value) -> bool:
    """Whether a value is `Concat(-x[half:], x[:half])` along the last axis."""
    joined = maker(value, "Concat")
    if joined is None or len(joined.inputs) != 2 or joined.attributes["axis"].as_int() not in (-1, 3):
        return False
    half = _width(angles) // 2
    first, second = maker(made_from(joined.inputs[0], "Neg"), "Slice"), maker(joined.inputs[1], "Slice")
    if first is None or second is None or first.inputs[0] is not x or second.inputs[0] is not x:
        return False
    start, end = _bounds(first)
    return half > 0 and start == half and end is not None and end >= 2 * half and _bounds(second) == (0, half)


def _bounds(node: ir.Node) -> tuple[float | None, float | None]:
    """Where a Slice of the last of four axes with step 1 begins and ends; (-1, -1) for any other."""
    numbers = [number_of(value) for value in node.inputs[1:]]
    if len(numbers) < 3 or None in numbers or numbers[2] not in (-1, 3) or numbers[3:] not in ([], [1]):
        return -1, -1
    return numbers[0], numbers[1]


def _flat_heads(value: ir.Value | None) -> ir.Value | None:
    """`[batch, sequence, heads * width]` of which a value is a view with four axes."""
    source = made_from(value, "Reshape")
    return source if source is not None and source.shape is not None and len(source.shape) == 3 else None


def _flat(value: ir.Value | None) -> ir.Value | None:
    """What a value was before it was given heads and lost them again."""
    return _flat_heads(made_from(value, "Reshape"))


def _name(ops: tape.Tape, prefix: str) -> None:
    """Names of their own for new nodes and their results."""
    for number, inner in enumerate(ops.nodes):
        inner.name = f"{prefix}/{inner.op_type}_{number}"
        inner.outputs[0].name = f"{inner.name}.output"


def _whole(ops: tape.Tape, *numbers: int) -> ir.Value:
    return constant(ops, np.array(numbers, np.int64))
