"""The operator `qe_edge::QELinear`, version 1: its contract, and its body in standard ONNX operators.

`y = x_q @ W + (x @ down) * mask[e] @ up + bias`, where `x_q` is `x * inv_omega` on its per-token grid, `W` the decoded
INT4 weight and `e = argmin(|x| @ router)` per token: `qe_edge.layers.linear.QELinear.forward` with transposed weights.

Inputs (T is the model's float type; K inputs, N outputs, g group size, r total rank, E experts):

======== ============================ ==========================================================
x        T `[B, S, K]`                rank 3 always, or ONNX Runtime loses its INT4 kernel
qweight  INT4 `[K, N]`                INT3 values live in INT4
scales   T `[K/g, N]`                 one row per output channel grid
zeros    INT4 `[K/g, N]`, optional    asymmetric grids only
inv_omega    T `[K]`, optional        factor on the input of the quantized branch
down         T, INT8 or INT4 `[K, r]`, optional
up           T, INT8 or INT4 `[r, N]`, optional
down_scale   T `[r]`, optional        goes with an integer `down`
up_scale     T `[N]`, optional        goes with an integer `up`
router       T `[K, E]`, optional     scores on |x| in float32; lowest wins, ties to the lowest index
bias         T `[N]`, optional
======== ============================ ==========================================================

All nodes of one graph share one model-local function, because some tools know no function overloads: an operand that
only some layers need is given to the others as a neutral one (see `qe_edge.export.layers`).

Attributes: `weight_bits`, `act_bits` (0, 6 or 8), `group_size` (-1 per output channel), `rank_shared`, `rank_routed`,
`num_experts`, `plugin_version` "1" and `plugin_namespace` "" (TensorRT 10.7 and later look for the latter).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Protocol

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from qe_edge.numerics.grids import MIN_RANGE

DOMAIN = "qe_edge"
NAME = "QELinear"
VERSION = 1
LAYER = "layer"  # attribute of a bare node, before its layer is attached: the layer's dotted name
OPSET = 21  # the first with INT4; TensorRT 10.3 (JetPack 6.2) reads it

INPUTS = (
    "x", "qweight", "scales", "zeros", "inv_omega", "down", "up", "down_scale", "up_scale", "router", "bias",
)  # fmt: skip


@dataclass(frozen=True)
class Operands:
    """The inputs of one node, by name; None where an optional one is absent."""

    x: ir.Value
    qweight: ir.Value
    scales: ir.Value
    zeros: ir.Value | None = None
    inv_omega: ir.Value | None = None
    down: ir.Value | None = None
    up: ir.Value | None = None
    down_scale: ir.Value | None = None
    up_scale: ir.Value | None = None
    router: ir.Value | None = None
    bias: ir.Value | None = None

    def values(self) -> list[ir.Value | None]:
        """All inputs in the order of the operator."""
        return [getattr(self, name) for name in INPUTS]

    def present(self) -> tuple[str, ...]:
        """Names of the inputs that are there."""
        return tuple(name for name in INPUTS if getattr(self, name) is not None)


@dataclass(frozen=True)
class Attributes:
    """The numeric attributes of one node."""

    weight_bits: int
    act_bits: int
    group_size: int
    rank_shared: int
    rank_routed: int
    num_experts: int

    def onnx(self) -> dict[str, int | str]:
        """All attributes of the node."""
        return {**asdict(self), "plugin_version": "1", "plugin_namespace": ""}

    @classmethod
    def of(cls, node: ir.Node) -> Attributes:
        """Attributes of a `QELinear` node."""
        return cls(**{field.name: node.attributes[field.name].as_int() for field in fields(cls)})


class Products(Protocol):
    """A target's way to multiply weights. The rest of the body is the same everywhere."""

    def main(self, ops: tape.Tape, x: ir.Value, operands: Operands) -> ir.Value:
        """`x @ W` with the decoded INT4 weight."""

    def factor(self, ops: tape.Tape, x: ir.Value, factor: ir.Value, scale: ir.Value | None) -> ir.Value:
        """`x @ factor`, where an integer factor has one scale per column."""

    def rank_table(self, ops: tape.Tape, down: ir.Value) -> ir.Value:
        """Float `[E, r]`: 1 on the shared rank and on each expert's own, 0 elsewhere; `down` is `[K, r]`."""


@dataclass(frozen=True)
class CanonicalProducts:
    """The form that ONNX Runtime runs fastest, for any sizes: the sizes come from the node's attributes.

    Attributes:
        per_channel: Whether scales are one row per output channel without zero points; else there are groups, whose
            size may differ between nodes.
    """

    per_channel: bool

    def main(self, ops: tape.Tape, x: ir.Value, operands: Operands) -> ir.Value:
        """Block-wise or per-channel DequantizeLinear and MatMul, which ONNX Runtime fuses to MatMulNBits."""
        if self.per_channel:
            row = constant(ops, np.array([0], np.int64))
            inputs = [operands.qweight, ops.op("Squeeze", [operands.scales, row])]
            return ops.op("MatMul", [x, ops.op("DequantizeLinear", inputs, {"axis": 1})])
        inputs = [operands.qweight, operands.scales, *([] if operands.zeros is None else [operands.zeros])]
        layout = {"axis": ir.AttrInt64("axis", 0), "block_size": reference("block_size", "group_size")}
        return ops.op("MatMul", [x, ops.op("DequantizeLinear", inputs, layout)])

    def factor(self, ops: tape.Tape, x: ir.Value, factor: ir.Value, scale: ir.Value | None) -> ir.Value:
        """Cast and MatMul, then the scale: exact, and far faster there than DequantizeLinear and MatMul."""
        if scale is None:
            return ops.op("MatMul", [x, factor])
        real = ops.op("Cast", [factor], {"to": ir.DataType.FLOAT.value})
        return ops.op("Mul", [ops.op("MatMul", [x, real]), scale])

    def rank_table(self, ops: tape.Tape, down: ir.Value) -> ir.Value:
        """Computed from the attributes; ONNX Runtime folds it to a constant."""
        zero, one = (constant(ops, np.array(value, np.int64)) for value in (0, 1))
        last = constant(ops, np.array([-1], np.int64))
        experts, shared, routed = (
            ops.op("Constant", [], {"value_int": reference("value_int", name)})
            for name in ("num_experts", "rank_shared", "rank_routed")
        )
        rank = ops.op("Squeeze", [ops.op("Shape", [down], {"start": 1})])
        column = ops.op("Range", [zero, rank, one])
        owner = ops.op("Div", [ops.op("Sub", [column, shared]), ops.op("Max", [routed, one])])
        expert = ops.op("Unsqueeze", [ops.op("Range", [zero, experts, one]), last])
        used = ops.op("Or", [ops.op("Less", [column, shared]), ops.op("Equal", [owner, expert])])
        return ops.op("Cast", [used], {"to": ir.DataType.FLOAT.value})


def rank_table(ops: tape.Tape, attributes: Attributes) -> ir.Value:
    """What `Products.rank_table` describes, as a constant.

    Example:
        >>> ops = tape.Tape()
        >>> attributes = Attributes(
        ...     weight_bits=4, act_bits=8, group_size=-1, rank_shared=1, rank_routed=1, num_experts=2
        ... )
        >>> rank_table(ops, attributes).producer().attributes["value"].as_tensor().numpy()
        array([[1., 1., 0.],
               [1., 0., 1.]], dtype=float32)
    """
    routed = np.repeat(np.eye(attributes.num_experts, dtype=np.float32), attributes.rank_routed, axis=1)
    shared = np.ones((attributes.num_experts, attributes.rank_shared), np.float32)
    return constant(ops, np.concatenate((shared, routed), axis=1))


def linear_body(ops: tape.Tape, operands: Operands, act_bits: int, products: Products) -> ir.Value:
    """Append the operator's body in standard operators to `ops`; returns the output `[B, S, N]`.

    Example:
        >>> ops = tape.Tape()
        >>> x, qweight, scales = (ir.Value(name=name) for name in ("x", "qweight", "scales"))
        >>> _ = linear_body(ops, Operands(x, qweight, scales), act_bits=0, products=CanonicalProducts(per_channel=True))
        >>> [node.op_type for node in ops.nodes]
        ['Constant', 'Squeeze', 'DequantizeLinear', 'MatMul']
    """
    main = operands.x if operands.inv_omega is None else ops.op("Mul", [operands.x, operands.inv_omega])
    if act_bits:
        main = fake_quantized(ops, main, act_bits)
    y = products.main(ops, main, operands)
    if operands.down is not None and operands.up is not None:
        hidden = products.factor(ops, operands.x, operands.down, operands.down_scale)
        if operands.router is not None:
            scores = ops.op("MatMul", [ops.op("Abs", [operands.x]), operands.router])
            expert = ops.op("ArgMin", [scores], {"axis": -1, "keepdims": 0})
            mask = ops.op("Gather", [products.rank_table(ops, operands.down), expert], {"axis": 0})
            hidden = ops.op("Mul", [hidden, mask])
        y = ops.op("Add", [y, products.factor(ops, hidden, operands.up, operands.up_scale)])
    return y if operands.bias is None else ops.op("Add", [y, operands.bias])


def fake_quantized(ops: tape.Tape, x: ir.Value, bits: int) -> ir.Value:
    """`qe_edge.numerics.grids.fake_quantize_activation`: per-token symmetric rounding, back on the real axis.

    Example:
        >>> ops = tape.Tape()
        >>> _ = fake_quantized(ops, ir.Value(name="x"), bits=8)
        >>> [node.op_type for node in ops.nodes if node.op_type != "Constant"]
        ['Abs', 'ReduceMax', 'Max', 'Div', 'Div', 'Round', 'Clip', 'Mul']
    """
    largest = 2 ** (bits - 1) - 1
    axis = constant(ops, np.array([-1], np.int64))
    peak = ops.op("ReduceMax", [ops.op("Abs", [x]), axis], {"keepdims": 1})
    peak = ops.op("Max", [peak, real_constant(ops, MIN_RANGE)])
    scale = ops.op("Div", [peak, real_constant(ops, largest)])
    codes = ops.op("Round", [ops.op("Div", [x, scale])])
    codes = ops.op("Clip", [codes, real_constant(ops, -largest - 1), real_constant(ops, largest)])
    return ops.op("Mul", [codes, scale])


def linear_function(present: tuple[str, ...], act_bits: int, per_channel: bool) -> ir.Function:
    """The model-local function for nodes that all have the inputs `present`.

    Example:
        >>> function = linear_function(("x", "qweight", "scales"), act_bits=8, per_channel=True)
        >>> function.identifier(), len(function.inputs)
        (('qe_edge', 'QELinear', ''), 11)
    """
    values = {name: ir.Value(name=name) for name in INPUTS}
    ops = tape.Tape()
    y = linear_body(ops, Operands(**{name: values[name] for name in present}), act_bits, CanonicalProducts(per_channel))
    y.name = "y"
    graph = ir.Graph(list(values.values()), [y], nodes=ops.nodes, opset_imports={"": OPSET}, name=NAME)
    names = [*(field.name for field in fields(Attributes)), "plugin_version", "plugin_namespace"]
    declared = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in names]
    return ir.Function(DOMAIN, NAME, graph=graph, attributes=declared)


def reference(name: str, source: str) -> ir.Attr:
    """An integer attribute `name` that takes the value of the function's attribute `source`.

    Example:
        >>> attribute = reference("block_size", "group_size")
        >>> attribute.name, attribute.ref_attr_name
        ('block_size', 'group_size')
    """
    return ir.RefAttr(name, source, ir.AttributeType.INT)


def initializer(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A value that holds a tensor, to be registered with a graph; the tensor takes the name.

    Example:
        >>> value = initializer("bias", ir.tensor(np.ones(3, np.float32)))
        >>> value.name, value.dtype.name, value.shape
        ('bias', 'FLOAT', Shape([3]))
    """
    tensor.name = name
    shape = ir.Shape(tensor.shape.numpy())
    return ir.Value(name=name, const_value=tensor, shape=shape, type=ir.TensorType(tensor.dtype))


def constant(ops: tape.Tape, array: np.ndarray) -> ir.Value:
    """A Constant node holding `array`.

    Example:
        >>> ops = tape.Tape()
        >>> value = constant(ops, np.array([0, -1]))
        >>> value.producer().op_type, value.producer().attributes["value"].as_tensor().numpy()
        ('Constant', array([ 0, -1]))
    """
    return ops.op("Constant", [], {"value": ir.tensor(array)})


def real_constant(ops: tape.Tape, value: float) -> ir.Value:
    """A float32 scalar.

    Example:
        >>> ops = tape.Tape()
        >>> real_constant(ops, 0.5).producer().attributes["value"].as_tensor().dtype.name
        'FLOAT'
    """
    return constant(ops, np.array(value, np.float32))
