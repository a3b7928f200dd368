"""TensorRT's own INT4 weight-only product, beside ours. Its engines build without a GPU. Not yet run on hardware."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper

if TYPE_CHECKING:
    from device.machine import DeviceMachine

GROUP = 128
MODULES = ("tensorrt", "tensorrt_rtx")
TOKENS = (1, 8, 64, 1024)


class Int4Error(RuntimeError):
    """TensorRT refuses the product; the message is its own."""


def library() -> str | None:
    """The Python module of TensorRT that is installed, or None."""
    return next((name for name in MODULES if find_spec(name) is not None), None)


def weight_only_model(k: int, n: int) -> bytes:
    """A float16 product whose INT4 weight is dequantized in groups of 128, the form that TensorRT fuses."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, k * n // 2).astype(np.uint8)
    scales = np.full((k // GROUP, n), 0.01, np.float16)
    tensors = [
        helper.make_tensor("codes", TensorProto.INT4, (k, n), codes.tobytes(), raw=True),
        helper.make_tensor("scales", TensorProto.FLOAT16, scales.shape, scales.tobytes(), raw=True),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["weight"], axis=0, block_size=GROUP),
        helper.make_node("MatMul", ["x", "weight"], ["y"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1, "S", size]) for name, size in (("x", k), ("y", n))
    ]
    graph = helper.make_graph(nodes, "int4", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def build(module: str, model: bytes, k: int, tokens: int, capability: str | None = None) -> bytes:
    """A serialized engine for one number of tokens. Raises Int4Error.

    Args:
        module: "tensorrt" or "tensorrt_rtx".
        model: What `weight_only_model` made.
        k: in_features.
        tokens: Tokens that the engine is tuned for.
        capability: For a machine without a GPU, in TensorRT-RTX: for example "SM89".
    """
    trt: Any = import_module(module)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        raise Int4Error(str(parser.get_error(0)))
    config = builder.create_builder_config()
    if capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("x", *[(1, tokens, k)] * 3)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise Int4Error("no engine was built")
    return bytes(engine)


def microseconds(machine: DeviceMachine, module: str, engine: bytes, k: int, n: int, tokens: int) -> float:
    """Median time of one product on the machine's GPU."""
    trt: Any = import_module(module)
    loaded = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(engine)
    if loaded is None:
        raise Int4Error("the engine cannot be loaded")
    context = loaded.create_execution_context()
    machine.clear()
    context.set_input_shape("x", (1, tokens, k))
    context.set_tensor_address("x", machine.add(np.zeros((tokens, k), np.float16), "x", writable=False))
    context.set_tensor_address("y", machine.add(np.zeros((tokens, n), np.float16), "y", writable=True))
    return machine.microseconds(lambda: context.execute_async_v3(0), 50)


def times(machine: DeviceMachine, shapes: dict[str, list[tuple[int, int]]]) -> tuple[list[dict[str, Any]], str]:
    """One row per shape and number of tokens, and why there are none or not all."""
    module = library()
    if module is None:
        return [], "TensorRT's Python module is not installed."
    rows: list[dict[str, Any]] = []
    for name, pairs in shapes.items():
        for k, n in pairs:
            model = weight_only_model(k, n)
            for tokens in TOKENS:
                try:
                    taken = microseconds(machine, module, build(module, model, k, tokens), k, n, tokens)
                except Int4Error as error:
                    return rows, f"{module} fails at {k} x {n}, {tokens} tokens: {error}."
                rows.append({"model": name, "k": k, "n": n, "tokens": tokens, "microseconds": taken})
    return rows, ""
