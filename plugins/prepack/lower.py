"""Lower canonical QELinear nodes to what the TensorRT plugin takes: prepacked weights, integer attributes.

Once per target, at build time. The canonical model is not changed; the result runs in TensorRT only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from .floats import Dtype
from .linear import CanonicalLinear, PackError
from .neutral import without_neutral
from .pack import PackedLinear, pack

DOMAIN, OP = "qe_edge", "QELinear"
LAYOUT_VERSION = 4  # the plugin refuses another one; host/attributes.h has the same number

INPUTS = ("x", "qweight", "scales", "zeros", "inv_omega", "down", "up", "down_scale", "up_scale", "router", "bias")
_DTYPES: dict[int, Dtype] = {TensorProto.FLOAT16: "f16", TensorProto.BFLOAT16: "bf16"}
_ORDER = ("weight", "columns", "scales", "zeros", "inv_omega", "down", "down_scale", "up", "router")


def lower(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the model whose QELinear nodes carry prepacked weights. Raises PackError for a node that cannot.

    Example:
        >>> text = "g (float[1, 2, 64] x) => (float[1, 2, 32] y) { y = qe_edge.QELinear (x, w, s) }"
        >>> graph = onnx.parser.parse_graph(text)
        >>> codes = helper.make_tensor("w", TensorProto.INT4, (64, 32), np.zeros(64 * 16, np.uint8).tobytes(), raw=True)
        >>> graph.initializer.extend([codes, numpy_helper.from_array(np.ones((1, 32), np.float32), "s")])
        >>> [node.op_type for node in lower(helper.make_model(graph)).graph.node]
        ['Cast', 'QELinear', 'Cast']
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes, added = [], []
    for node in graph.node:
        if (node.domain, node.op_type) != (DOMAIN, OP):
            nodes.append(node)
            continue
        lowered, tensors = _lower_node(node, constants)
        nodes += lowered
        added += tensors
    used = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used] + added
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    functions = [f for f in result.functions if (f.domain, f.name) != (DOMAIN, OP)]
    del result.functions[:]  # before TensorRT 10.7 a function of the same name would win over the plugin
    result.functions.extend(functions)
    return result


def _values(tensor: TensorProto) -> NDArray[Any]:
    """Integers as int8, floating point as float32."""
    array = numpy_helper.to_array(tensor)
    if tensor.data_type in (TensorProto.INT4, TensorProto.INT8):
        return array.astype(np.int8)
    return array.astype(np.float32)


def read_node(node: onnx.NodeProto, constants: dict[str, TensorProto]) -> CanonicalLinear:
    """The layer that a canonical node describes, without its neutral operands. Raises PackError if one is missing.

    Example:
        >>> node = onnx.parser.parse_node("y = qe_edge.QELinear (x, w, s)")
        >>> codes = helper.make_tensor("w", TensorProto.INT4, (64, 32), np.zeros(64 * 16, np.uint8).tobytes(), raw=True)
        >>> linear = read_node(node, {"w": codes, "s": numpy_helper.from_array(np.ones((1, 32), np.float32), "s")})
        >>> linear.in_features, linear.out_features
        (64, 32)
    """
    named = {role: name for role, name in zip(INPUTS, node.input, strict=False) if name}
    missing = [role for role, name in named.items() if role != "x" and name not in constants]
    if missing or "qweight" not in named or "scales" not in named:
        what = ", ".join(missing) or "qweight or scales"
        raise PackError(f"{node.name}: {what} is no initializer of the graph. Export the weights as initializers.")
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    unknown = sorted(attributes.keys() - _KNOWN) or list(node.input[len(INPUTS) :])
    if unknown:
        raise PackError(f"{node.name}: {unknown[0]} is nothing that the kernels know. Build without --plugin.")
    fields: dict[str, Any] = {role: _values(constants[name]) for role, name in named.items() if role != "x"}
    fields |= {key: int(attributes.get(key, default)) for key, default in _INTEGERS.items()}
    return CanonicalLinear(**without_neutral(fields))


def _lower_node(
    node: onnx.NodeProto, constants: dict[str, TensorProto]
) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    linear = read_node(node, constants)
    kind = constants[node.input[INPUTS.index("scales")]].data_type
    packed = pack(linear, _DTYPES.get(kind, "f16"))
    tensors = [_tensor(f"{node.name or node.output[0]}.packed.{role}", role, packed) for role in _present(packed)]
    lowered = helper.make_node(
        OP,
        [node.input[0], *(tensor.name for tensor in tensors)],
        list(node.output),
        name=node.name,
        domain=DOMAIN,
        plugin_version="1",
        plugin_namespace="",
        layout_version=LAYOUT_VERSION,
        in_features=linear.in_features,
        out_features=linear.out_features,
        weight_bits=packed.weight_bits,
        has_zeros=int(linear.zeros is not None),
        has_inv_omega=int(linear.inv_omega is not None),
        adapter_bits=packed.adapter_bits,
        **{key: getattr(linear, key) for key in _INTEGERS},
    )
    return _with_casts(lowered, kind), tensors


def _with_casts(node: onnx.NodeProto, kind: int) -> list[onnx.NodeProto]:
    """The node itself, or between casts when the model computes in float32: the kernels take 16 bits."""
    if kind in _DTYPES:
        return [node]
    x, y = node.input[0], node.output[0]
    half_x, half_y = f"{y}.half_input", f"{y}.half_output"
    node.input[0], node.output[0] = half_x, half_y
    return [
        helper.make_node("Cast", [x], [half_x], name=half_x, to=TensorProto.FLOAT16),
        node,
        helper.make_node("Cast", [half_y], [y], name=half_y, to=kind),
    ]


_INTEGERS = {"act_bits": 0, "group_size": -1, "rank_shared": 0, "rank_routed": 0, "num_experts": 0}
_KNOWN = {*_INTEGERS, "weight_bits", "plugin_version", "plugin_namespace"}


def _present(packed: PackedLinear) -> list[str]:
    return [role for role in _ORDER if getattr(packed, role) is not None]


def _tensor(name: str, role: str, packed: PackedLinear) -> TensorProto:
    """Bytes become INT8 (the parser widens UINT8 to INT32), 16-bit patterns the model's own type, scales float16."""
    array: NDArray[Any] = getattr(packed, role)
    half = TensorProto.FLOAT16 if packed.dtype == "f16" or role == "scales" else TensorProto.BFLOAT16
    kinds = {np.dtype(np.uint8): TensorProto.INT8, np.dtype(np.int8): TensorProto.INT8,
             np.dtype(np.uint16): half, np.dtype(np.float32): TensorProto.FLOAT}  # fmt: skip
    shape = (array.shape[0], array.size // array.shape[0])
    return helper.make_tensor(name, kinds[array.dtype], shape, np.ascontiguousarray(array).tobytes(), raw=True)
