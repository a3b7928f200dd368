"""Layers of the gated delta rule in standard operators that TensorRT reads.

New tokens are cut into chunks (Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence
Length"), the last of which is filled up with tokens that change nothing. With `G_i` the sum of a chunk's decays up to
its token i, `G_C` the sum of all,
`D_ij = exp(G_i - G_j)` for `i >= j`, else 0, and `L_ij = beta_i D_ij k_i k_j` for `i > j`:

- `T = (I + L)^-1`, `U = T (beta V)` and `W = T (beta exp(G) K)`, for all chunks at once,
- `R = U - W S`, `O = exp(G) Q S + (D * Q K^T) R` and `S' = exp(G_C) S + (exp(G_C - G) K)^T R`, from chunk to chunk.

No exponent is above 0. The inverse is that of blocks of 1, 2, 4 ... tokens: `T_2s = T_s - T_s L_s T_s`, where `L_s` is
the part of `L` between two blocks of `s` tokens.

TensorRT-RTX 1.7 refuses a branch for single tokens beside the chunks, and takes 64 GB to build chunks of a size that
follows from the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from qe_edge.export.lowering.inline import FLOAT32, add_initializer
from qe_edge.export.lowering.passes import InPlacePass, PassResult, ensure, require
from qe_edge.models.linear_attention import DOMAIN, NAME

CHUNK = 16  # tokens; a larger chunk costs a single new token more, a smaller one costs a prompt more steps
ROWS = [1, 0, 3, 2, 4]  # from [batch, chunks, tokens, heads, width] to [chunks, batch, heads, tokens, width], and back
FLIPPED = [0, 1, 2, 4, 3]


class ExpandDeltaRule(InPlacePass):
    """Replaces every `LinearAttention`. Requires matrices of known sizes; ensures that there is no such node left.

    Example:
        >>> text = '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) { y = Abs (x) }'
        >>> ExpandDeltaRule()(ir.from_onnx_text(text)).modified
        False
    """

    def requires(self, model: ir.Model) -> None:
        """The sizes of the matrices are known."""
        for node in _nodes(model):
            require(len(node.inputs) == 6 and None not in node.inputs, f"'{node.name}' has all of its inputs.")
            require(_sizes(node) is not None, f"The matrices of '{node.name}' have known sizes.")

    def call(self, model: ir.Model) -> PassResult:
        """Expand all of them."""
        nodes, shared = _nodes(model), _Shared(model.graph)
        for node in nodes:
            _expand(model.graph, node, shared)
        if nodes:
            model.functions.pop((DOMAIN, NAME, ""), None)
        return PassResult(model, modified=bool(nodes))

    def ensures(self, model: ir.Model) -> None:
        """No such node is left."""
        ensure(not _nodes(model), f"No {NAME} is left.")


def expand_delta_rule(model: ir.Model) -> None:
    """Replace the nodes of the gated delta rule, in place.

    Args:
        model: A graph whose inputs `past_key_values.{layer}.recurrent` are `[batch, heads, key width, value width]`.

    Example:
        >>> tokens = "float[1, t, 8] q, float[1, t, 8] k, float[1, t, 8] v, float[1, 2, 4, 4] s"
        >>> gates, numbers = "float[1, t, 2] g, float[1, t, 2] b", "q_num_heads: int = 2, kv_num_heads: int = 2"
        >>> node = f'y, n = com.microsoft.LinearAttention <{numbers}, scale: float = 0.5> (q, k, v, s, g, b)'
        >>> head = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>'
        >>> results = "float[1, t, 8] y, float[1, 2, 4, 4] n"
        >>> model = ir.from_onnx_text(f"{head} g ({tokens}, {gates}) => ({results}) {{ {node} }}")
        >>> expand_delta_rule(model)
        >>> sum(node.op_type == "Scan" for node in model.graph)
        1
    """
    ExpandDeltaRule()(model)


def _nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, NAME)]


def _sizes(node: ir.Node) -> tuple[int, int, int] | None:
    """Heads, width of keys and width of values, from the matrices."""
    past = node.inputs[3]
    sizes = [] if past is None or past.shape is None else [size for size in list(past.shape)[1:] if type(size) is int]
    return (sizes[0], sizes[1], sizes[2]) if len(sizes) == 3 else None


@dataclass
class _Shared:
    """What all layers of a graph have in common; made when a layer first asks.

    Attributes:
        graph: The graph.
        whole_numbers: int64 vectors by their numbers.
        cut: How new tokens become chunks.
    """

    graph: ir.Graph
    whole_numbers: dict[tuple[int, ...], ir.Value] = field(default_factory=dict)
    cut: _Cut | None = None

    def whole(self, *numbers: int) -> ir.Value:
        """An int64 vector."""
        if numbers not in self.whole_numbers:
            name = f"delta_rule.whole_{len(self.whole_numbers)}"
            self.whole_numbers[numbers] = add_initializer(self.graph, name, np.array(numbers, np.int64))
        return self.whole_numbers[numbers]


@dataclass(frozen=True)
class _Cut:
    """How new tokens become chunks. Constants are `[CHUNK, CHUNK]`.

    Attributes:
        count: New tokens, int64 `[1]`.
        pads: Of `[batch, tokens, heads, width]`; zeros fill the last chunk, which change nothing.
        lower: 1 on and below the diagonal.
        below: 1 below it.
        unit: 1 on it.
        blocks: 1 between two blocks of 1 token, of 2, of 4 ... that make one together.
    """

    count: ir.Value
    pads: ir.Value
    lower: ir.Value
    below: ir.Value
    unit: ir.Value
    blocks: list[ir.Value]

    @classmethod
    def of(cls, ops: tape.Tape, query: ir.Value, shared: _Shared) -> _Cut:
        count = ops.op("Shape", [query], {"start": 1, "end": 2})
        rest = ops.op("Mod", [ops.op("Neg", [count]), shared.whole(CHUNK)])
        pads = ops.op("Concat", [shared.whole(0, 0, 0, 0, 0), rest, shared.whole(0, 0)], {"axis": 0})
        triangle, place = np.tril(np.ones((CHUNK, CHUNK), bool)), np.arange(CHUNK)
        whole = {"lower": triangle, "below": triangle & ~triangle.T, "unit": triangle & triangle.T}
        for size in (1 << power for power in range(CHUNK.bit_length() - 1)):
            same = place[:, None] // (2 * size) == place // (2 * size)
            whole[f"block_{size}"] = same & (place[:, None] // size > place // size)
        lower, below, unit, *blocks = (
            add_initializer(shared.graph, f"delta_rule.{name}", mask.astype(np.float32)) for name, mask in whole.items()
        )
        return cls(count, pads, lower, below, unit, blocks)


def _expand(graph: ir.Graph, node: ir.Node, shared: _Shared) -> None:
    query, key, value, past, decay, beta = (part for part in node.inputs if part is not None)
    sizes = _sizes(node)
    if sizes is None:
        raise ValueError(f"node {node.name} has matrices of unknown sizes")
    ops, heads = tape.Tape(), sizes[0]
    if shared.cut is None:
        shared.cut = _Cut.of(ops, query, shared)
    scale = add_initializer(graph, f"{node.name}.scale", np.array(node.attributes["scale"].as_float(), np.float32))
    split = shared.whole(0, 0, heads, -1)
    parts = [ops.op("Reshape", [part, split]) for part in (ops.op("Mul", [query, scale]), key, value)]
    parts += [ops.op("Unsqueeze", [part, shared.whole(-1)]) for part in (decay, beta)]
    results = _chunks(ops, parts, past, sizes, shared, shared.cut, str(node.name))
    _name(ops.nodes, str(node.name))
    for inner in ops.nodes:
        inner.meta[FLOAT32] = True
    for output, result in zip(node.outputs, results, strict=True):
        result.type, result.shape = output.type, output.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], ops.nodes, node.outputs, results)


def _chunks(
    ops: tape.Tape, parts: list[ir.Value], past: ir.Value, sizes: tuple[int, int, int], shared: _Shared, cut: _Cut,
    name: str,
) -> list[ir.Value]:  # fmt: skip
    """Mixed values `[batch, tokens, heads * value width]`, and matrices `[batch, heads, key width, value width]`.

    Args:
        ops: Where nodes go; values are `[chunks, batch, heads, CHUNK, width]`.
        parts: Scaled queries, keys and values `[batch, tokens, heads, width]`, decays and betas of the width 1.
        past: Matrices.
        sizes: Heads, width of keys, width of values.
        shared: Constants.
        cut: Chunks.
        name: The node's.
    """
    heads, key_width, value_width = sizes
    query, key, value, decay, beta = (
        ops.op(
            "Transpose",
            [ops.op("Reshape", [ops.op("Pad", [part, cut.pads]), shared.whole(0, -1, CHUNK, heads, width)])],
            {"perm": ROWS},
        )
        for part, width in zip(parts, (key_width, key_width, value_width, 1, 1), strict=True)
    )
    flipped = ops.op("Transpose", [key], {"perm": FLIPPED})
    # sums of the decays between two tokens, and no differences of longer sums, which would cancel
    later = ops.op("MatMul", [cut.lower, ops.op("Mul", [decay, cut.below])])
    fade = ops.op("Mul", [ops.op("Exp", [later]), cut.lower])
    since = ops.op("Exp", [ops.op("MatMul", [cut.lower, decay])])
    inverse = _inverse(ops, ops.op("Mul", [ops.op("Mul", [ops.op("MatMul", [key, flipped]), fade]), beta]), cut)
    learnt = ops.op("MatMul", [inverse, ops.op("Mul", [value, beta])])
    known = ops.op("MatMul", [inverse, ops.op("Mul", [key, ops.op("Mul", [since, beta])])])
    seen = ops.op("Mul", [ops.op("MatMul", [query, flipped]), fade])
    asked = ops.op("Mul", [query, since])
    last = [shared.whole(CHUNK - 1), shared.whole(CHUNK), shared.whole(3)]  # of a chunk's tokens
    kept = ops.op("Mul", [flipped, ops.op("Slice", [fade, *last])])
    faded = ops.op("Slice", [since, *last])
    present, mixed = ops.op_multi_out(
        "Scan",
        [past, learnt, known, asked, seen, kept, faded],
        {"body": _between(f"{name}/chunk"), "num_scan_inputs": 6},
        num_outputs=2,
    )
    joined = ops.op("Reshape", [ops.op("Transpose", [mixed], {"perm": ROWS}), shared.whole(0, -1, heads * value_width)])
    return [ops.op("Slice", [joined, shared.whole(0), cut.count, shared.whole(1)]), present]


def _inverse(ops: tape.Tape, product: ir.Value, cut: _Cut) -> ir.Value:
    """`(I + L)^-1` of `L`, which is `product` below the diagonal."""
    first, *others = cut.blocks
    inverse = ops.op("Sub", [cut.unit, ops.op("Mul", [product, first])])
    for block in others:
        between = ops.op("MatMul", [inverse, ops.op("MatMul", [ops.op("Mul", [product, block]), inverse])])
        inverse = ops.op("Sub", [inverse, between])
    return inverse


def _between(prefix: str) -> ir.Graph:
    """From one chunk to the next: `S`, `U`, `W`, and so on as at the top of this file; `S'` and `O` come out."""
    names = ("state", "learnt", "known", "asked", "seen", "kept", "faded")
    state, learnt, known, asked, seen, kept, faded = given = [
        ir.Value(name=f"{prefix}.{name}", type=ir.TensorType(ir.DataType.FLOAT)) for name in names
    ]
    ops = tape.Tape()
    surprise = ops.op("Sub", [learnt, ops.op("MatMul", [known, state])])
    mixed = ops.op("Add", [ops.op("MatMul", [asked, state]), ops.op("MatMul", [seen, surprise])])
    after = ops.op("Add", [ops.op("Mul", [state, faded]), ops.op("MatMul", [kept, surprise])])
    _name(ops.nodes, prefix)
    for result in (after, mixed):
        result.type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Graph(given, [after, mixed], nodes=ops.nodes, name=prefix)


def _name(nodes: Iterable[ir.Node], prefix: str) -> None:
    for number, node in enumerate(nodes):
        node.name = f"{prefix}/{node.op_type}_{number}"
        for place, output in enumerate(node.outputs):
            output.name = f"{node.name}.output_{place}"
