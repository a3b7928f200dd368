"""The operator `qe_edge::QELinear`, version 1: its contract, and its body in standard ONNX operators.

`y = x_q @ W + (x @ down) * mask[e] @ up + bias`, where `x_q` is `x * inv_omega` on its per-token grid, `W` the decoded
INT4 weight and `e = argmin(|x| @ router)` per token: `qe_edge.linear.QELinear.forward` with transposed weights.

Inputs (T is the model's float type; K inputs, N outputs, g group size, r total rank, E experts):

======== ============================ ==========================================================
x        T `[B, S, K]`                rank 3 always, or ONNX Runtime loses its INT4 kernel
qweight  INT4 `[K, N]`                INT3 values live in INT4
scales   T `[K/g, N]`                 one row per output channel grid
zeros    INT4 `[K/g, N]`, optional    asymmetric grids only
inv_omega    T `[K]`, optional        factor on the input of the quantized branch
down         T or INT8 `[K, r]`, optional
up           T or INT8 `[r, N]`, optional
down_scale   T `[r]`, optional        goes with INT8 `down`
up_scale     T `[N]`, optional        goes with INT8 `up`
router       T `[K, E]`, optional     scores on |x| in float32; lowest wins, ties to the lowest index
bias         T `[N]`, optional
======== ============================ ==========================================================

Attributes: `weight_bits`, `act_bits` (0, 6 or 8), `group_size` (-1 per output channel), `rank_shared`, `rank_routed`,
`num_experts`, `plugin_version` "1" and `plugin_namespace` "" (TensorRT 10.7 and later look for the latter).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Protocol

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from qe_edge.grids import MIN_RANGE, PER_CHANNEL

DOMAIN = "qe_edge"
NAME = "QELinear"
VERSION = 1
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


class Forms(Protocol):
    """How a target wants its weights multiplied; everything else of the body is the same everywhere."""

    def main(self, ops: tape.Tape, x: ir.Value, operands: Operands, attributes: Attributes) -> ir.Value:
        """`x @ W` with the decoded INT4 weight."""

    def factor(self, ops: tape.Tape, x: ir.Value, factor: ir.Value, scale: ir.Value | None) -> ir.Value:
        """`x @ factor`, where an INT8 factor has one scale per column."""


class CanonicalForms:
    """What ONNX Runtime runs fastest: its pattern of MatMulNBits, and INT8 factors scaled on the small side."""

    def main(self, ops: tape.Tape, x: ir.Value, operands: Operands, attributes: Attributes) -> ir.Value:
        """Block-wise or per-channel DequantizeLinear and MatMul, which ONNX Runtime fuses."""
        scales, zeros = operands.scales, operands.zeros
        layout = {"axis": 0, "block_size": attributes.group_size}
        if attributes.group_size == PER_CHANNEL:
            row = constant(ops, np.array([0], np.int64))
            scales = ops.op("Squeeze", [scales, row])
            zeros = None if zeros is None else ops.op("Squeeze", [zeros, row])
            layout = {"axis": 1}
        inputs = [operands.qweight, scales] if zeros is None else [operands.qweight, scales, zeros]
        return ops.op("MatMul", [x, ops.op("DequantizeLinear", inputs, layout)])

    def factor(self, ops: tape.Tape, x: ir.Value, factor: ir.Value, scale: ir.Value | None) -> ir.Value:
        """Cast and MatMul, then the scale: exact, and far faster there than DequantizeLinear and MatMul."""
        if scale is None:
            return ops.op("MatMul", [x, factor])
        real = ops.op("Cast", [factor], {"to": ir.DataType.FLOAT.value})
        return ops.op("Mul", [ops.op("MatMul", [x, real]), scale])


CANONICAL = CanonicalForms()


def linear_body(ops: tape.Tape, operands: Operands, attributes: Attributes, forms: Forms = CANONICAL) -> ir.Value:
    """Append the operator's body in standard operators to `ops`; returns the output `[B, S, N]`."""
    main = operands.x if operands.inv_omega is None else ops.op("Mul", [operands.x, operands.inv_omega])
    if attributes.act_bits:
        main = fake_quantized(ops, main, attributes.act_bits)
    y = forms.main(ops, main, operands, attributes)
    if operands.down is not None and operands.up is not None:
        hidden = forms.factor(ops, operands.x, operands.down, operands.down_scale)
        if operands.router is not None:
            hidden = ops.op("Mul", [hidden, expert_mask(ops, operands.x, operands.router, attributes)])
        y = ops.op("Add", [y, forms.factor(ops, hidden, operands.up, operands.up_scale)])
    return y if operands.bias is None else ops.op("Add", [y, operands.bias])


def fake_quantized(ops: tape.Tape, x: ir.Value, bits: int) -> ir.Value:
    """`qe_edge.grids.fake_quantize_activation`: per-token symmetric rounding, back on the real axis."""
    largest = 2 ** (bits - 1) - 1
    axis = constant(ops, np.array([-1], np.int64))
    peak = ops.op("ReduceMax", [ops.op("Abs", [x]), axis], {"keepdims": 1})
    peak = ops.op("Max", [peak, real_constant(ops, MIN_RANGE)])
    scale = ops.op("Div", [peak, real_constant(ops, largest)])
    codes = ops.op("Round", [ops.op("Div", [x, scale])])
    codes = ops.op("Clip", [codes, real_constant(ops, -largest - 1), real_constant(ops, largest)])
    return ops.op("Mul", [codes, scale])


def expert_mask(ops: tape.Tape, x: ir.Value, router: ir.Value, attributes: Attributes) -> ir.Value:
    """`[B, S, r]`: 1 on the shared rank and on the chosen expert's, 0 elsewhere."""
    scores = ops.op("MatMul", [ops.op("Abs", [x]), router])
    expert = ops.op("ArgMin", [scores], {"axis": -1, "keepdims": 0})
    routed = np.repeat(np.eye(attributes.num_experts, dtype=np.float32), attributes.rank_routed, axis=1)
    shared = np.ones((attributes.num_experts, attributes.rank_shared), np.float32)
    table = constant(ops, np.concatenate((shared, routed), axis=1))
    return ops.op("Gather", [table, expert], {"axis": 0})


def linear_function(present: tuple[str, ...], attributes: Attributes) -> ir.Function:
    """The model-local function for nodes with the inputs `present`; its overload names the variant."""
    values = {name: ir.Value(name=name) for name in INPUTS}
    ops = tape.Tape()
    y = linear_body(ops, Operands(**{name: values[name] for name in present}), attributes)
    y.name = "y"
    graph = ir.Graph(
        list(values.values()), [y], nodes=ops.nodes, opset_imports={"": OPSET}, name=overload(present, attributes)
    )
    declared = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in attributes.onnx()]
    return ir.Function(DOMAIN, NAME, overload(present, attributes), graph=graph, attributes=declared)


def overload(present: tuple[str, ...], attributes: Attributes) -> str:
    """Name of a variant, for example "w4a8_channel_r8_8x8_down_up_down-scale_up-scale_router_bias"."""
    group = "channel" if attributes.group_size == PER_CHANNEL else f"g{attributes.group_size}"
    parts = [f"w{attributes.weight_bits}a{attributes.act_bits}", group]
    if "down" in present:
        parts.append(f"r{attributes.rank_shared}_{attributes.num_experts}x{attributes.rank_routed}")
    return "_".join([*parts, *(name.replace("_", "-") for name in present if name not in ("x", "qweight", "scales"))])


def constant(ops: tape.Tape, array: np.ndarray) -> ir.Value:
    """A Constant node holding `array`."""
    return ops.op("Constant", [], {"value": ir.tensor(array)})


def real_constant(ops: tape.Tape, value: float) -> ir.Value:
    """A float32 scalar."""
    return constant(ops, np.array(value, np.float32))
