"""One chain from ONNX to PTX: ONNX Runtime on standard operators, and the PTX that ships, agree on the same layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from emulator.plan import Planner
from emulator.ptx import PtxMachine
from emulator.session import run_linear
from prepack.linear import CanonicalLinear, PackError
from prepack.lower import lower
from prepack.neutral import without_neutral
from prepack.reference import dequantize_weight
from tests.cases import LIMIT, Mode, random_layer, random_tokens, relative_error
from tests.modes import MODES
from tests.onnx_models import canonical_model, int4_tensor

INT4_FACTORS = next(mode for mode in MODES if mode.adapter_bits == 4)
THREE_BITS = [mode for mode in MODES if mode.name in ("w3a8", "w3a8_g64")]


def standard_graph(linear: CanonicalLinear) -> bytes:
    """QELinear in standard float32 operators, as the canonical function spells it (weights by DequantizeLinear)."""
    tensors = [int4_tensor(linear.qweight, "qweight")]
    nodes: list[onnx.NodeProto] = []

    def value(name: str, array: np.ndarray) -> str:
        tensors.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def op(kind: str, *inputs: str, **attributes: Any) -> str:  # noqa: ANN401 - attributes of ONNX
        nodes.append(helper.make_node(kind, list(inputs), [f"v{len(nodes)}"], **attributes))
        return f"v{len(nodes) - 1}"

    def factor(name: str, array: np.ndarray, scale: np.ndarray | None) -> str:
        if scale is None:
            return value(name, array.astype(np.float32))
        tensors.append(int4_tensor(array, name))
        return op("DequantizeLinear", name, value(f"{name}_scale", scale.astype(np.float32)), axis=1)

    main = "x" if linear.inv_omega is None else op("Mul", "x", value("omega", linear.inv_omega.astype(np.float32)))
    if linear.act_bits:
        top = 2 ** (linear.act_bits - 1) - 1
        last = value("last", np.array([-1], np.int64))
        peak = op(
            "Max", op("ReduceMax", op("Abs", main), last, keepdims=1), value("tiny", np.array([1e-5], np.float32))
        )
        scale = op("Div", peak, value("top", np.array([top], np.float32)))
        rounded = op("Round", op("Div", main, scale))
        main = op("Mul", op("Clip", rounded, value("lo", np.float32(-top - 1)), value("hi", np.float32(top))), scale)
    block = linear.in_features if linear.group_size < 0 else linear.group_size
    inputs = ["qweight", value("scales", linear.scales.astype(np.float32))]
    if linear.zeros is not None:
        tensors.append(int4_tensor(linear.zeros, "zeros"))
        inputs.append("zeros")
    y = op("MatMul", main, op("DequantizeLinear", *inputs, axis=0, block_size=block))
    if linear.down is not None and linear.up is not None and linear.router is not None:
        hidden = op("MatMul", "x", factor("down", linear.down, linear.down_scale))
        expert = op("ArgMin", op("MatMul", op("Abs", "x"), value("router", linear.router.astype(np.float32))), axis=-1,
                    keepdims=0)  # fmt: skip
        owner = np.arange(linear.rank) - linear.rank_shared
        table = np.array([(owner < 0) | (owner // linear.rank_routed == e) for e in range(linear.num_experts)])
        hidden = op("Mul", hidden, op("Gather", value("table", table.astype(np.float32)), expert, axis=0))
        y = op("Add", y, op("MatMul", hidden, factor("up", linear.up, linear.up_scale)))
    if linear.bias is not None:
        y = op("Add", y, value("bias", linear.bias.astype(np.float32)))
    graph = helper.make_graph(
        nodes, "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "S", linear.in_features])],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, [1, "S", linear.out_features])],
        tensors,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    "mode", [MODES[0], MODES[1], MODES[12], MODES[13], *THREE_BITS, INT4_FACTORS], ids=lambda mode: mode.name
)
@pytest.mark.parametrize("tokens", [3, 6])
def test_onnx_runtime_and_ptx_agree(mode: Mode, tokens: int, planner: Planner, ptx_machine: PtxMachine) -> None:
    """Where the product quantizes x itself, and where a launch before it does."""
    linear, x = random_layer(mode, 256, 40), random_tokens(mode, tokens, 256)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")  # or it quantizes x again
    session = onnxruntime.InferenceSession(standard_graph(linear), options, providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": x[None]})[0][0]
    outcome = run_linear(ptx_machine, planner, linear, x, "f16")
    assert outcome.errors == []
    assert relative_error(outcome.y, expected.astype(np.float64)) <= LIMIT["f16"]


def test_neutral_operands_are_dropped() -> None:
    """What the exporter adds so that layers can share a function costs the plugin nothing."""
    linear = random_layer(Mode("plain", experts=0, rank_shared=0, bias=False, inv_omega=False), 128, 32)
    fields = {
        "qweight": linear.qweight, "scales": linear.scales, "group_size": 128, "act_bits": 8,
        "zeros": np.zeros((1, 32), np.int8), "inv_omega": np.ones(128, np.float32), "bias": np.zeros(32, np.float32),
        "down": np.zeros((128, 1), np.float32), "up": np.zeros((1, 32), np.float32),
        "router": np.zeros((128, 1), np.float32), "rank_shared": 1, "rank_routed": 0, "num_experts": 1,
    }  # fmt: skip
    kept = CanonicalLinear(**without_neutral(fields))
    assert (kept.group_size, kept.rank, kept.num_experts) == (-1, 0, 0)
    assert kept.zeros is kept.inv_omega is kept.bias is kept.down is kept.router is None
    assert np.array_equal(dequantize_weight(kept), dequantize_weight(linear))


def test_what_the_kernels_do_not_know_is_refused() -> None:
    model = canonical_model([Mode("w4a8")], [256, 256])
    model.graph.node[0].attribute.append(helper.make_attribute("rotation", 1))
    with pytest.raises(PackError, match="rotation is nothing that the kernels know"):
        lower(model)
    model = canonical_model([Mode("w4a8")], [256, 256])
    model.graph.node[0].input.append("layer0.more")
    with pytest.raises(PackError, match="more is nothing that the kernels know"):
        lower(model)


def test_a_float32_model_is_lowered_between_casts() -> None:
    model = canonical_model([Mode("w4a8")], [256, 256])
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    assert [node.op_type for node in lower(model).graph.node] == ["Cast", "QELinear", "Cast"]
