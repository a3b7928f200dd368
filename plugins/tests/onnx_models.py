"""Small canonical models: a chain of QELinear nodes with everything that a node may carry."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from prepack.floats import to_bits
from prepack.linear import CanonicalLinear
from prepack.lower import DOMAIN, INPUTS, OP
from tests.cases import Mode, random_layer


def int4_tensor(values: NDArray[np.int8], name: str) -> TensorProto:
    """INT4 initializer, two values a byte, low nibble first."""
    flat = values.reshape(-1).astype(np.uint8) & np.uint8(15)
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    return helper.make_tensor(
        name, TensorProto.INT4, values.shape, (flat[0::2] | (flat[1::2] << 4)).tobytes(), raw=True
    )


def canonical_node(
    linear: CanonicalLinear, mode: Mode, name: str, x: str, y: str
) -> tuple[onnx.NodeProto, list[TensorProto]]:
    """The node and its initializers."""
    half = TensorProto.FLOAT16 if mode.dtype == "f16" else TensorProto.BFLOAT16
    inputs, tensors = [x], []
    for role in INPUTS[1:]:
        values = getattr(linear, role)
        inputs.append("" if values is None else f"{name}.{role}")
        if values is None:
            continue
        if role in ("qweight", "zeros") or (role in ("down", "up") and mode.adapter_bits == 4):
            tensors.append(int4_tensor(values, inputs[-1]))
        elif values.dtype == np.int8:
            tensors.append(helper.make_tensor(inputs[-1], TensorProto.INT8, values.shape, values.tobytes(), raw=True))
        else:
            bits = to_bits(values, mode.dtype)
            tensors.append(helper.make_tensor(inputs[-1], half, values.shape, bits.tobytes(), raw=True))
    node = helper.make_node(
        OP, inputs, [y], name=name, domain=DOMAIN, plugin_version="1", plugin_namespace="",
        weight_bits=mode.weight_bits, act_bits=linear.act_bits, group_size=linear.group_size,
        rank_shared=linear.rank_shared, rank_routed=linear.rank_routed, num_experts=linear.num_experts,
    )  # fmt: skip
    return node, tensors


def canonical_model(modes: list[Mode], features: list[int]) -> onnx.ModelProto:
    """X [batch, sequence, features[0]] through one QELinear per mode."""
    half = TensorProto.FLOAT16 if modes[0].dtype == "f16" else TensorProto.BFLOAT16
    nodes, tensors = [], []
    for i, mode in enumerate(modes):
        linear = random_layer(mode, features[i], features[i + 1], seed=i)
        node, constants = canonical_node(linear, mode, f"layer{i}", f"h{i}", f"h{i + 1}")
        nodes.append(node)
        tensors += constants
    graph = helper.make_graph(
        nodes, "chain",
        [helper.make_tensor_value_info("h0", half, ["B", "S", features[0]])],
        [helper.make_tensor_value_info(f"h{len(modes)}", half, ["B", "S", features[-1]])],
        tensors,
    )  # fmt: skip
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)
