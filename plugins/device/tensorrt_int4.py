"""TensorRT's own INT4 weight-only product, beside ours. Its engines build without a GPU. Never timed yet."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from device import shapes
from device.driver import DeviceError, Driver
from device.gpu import ALIGNMENT, Gpu, round_up

NAME = "TensorRT INT4 g128"
GROUP = 128
MODULES: tuple[str, ...] = ("tensorrt", "tensorrt_rtx")
TOKENS = (1, 1024, 64)  # fewer than elsewhere: each takes an engine


class Int4Error(RuntimeError):
    """TensorRT refuses the product; the message is its own."""


def library() -> str | None:
    """The Python module of TensorRT that is installed, or None."""
    specs = ((name, find_spec(name)) for name in MODULES)
    # The folder plugins/tensorrt looks like a package without files of its own; that has no origin.
    return next((name for name, spec in specs if spec is not None and spec.origin is not None), None)


def weight_only_model(k: int, n: int) -> bytes:
    """A float16 product whose INT4 weight is dequantized in groups of 128, the form that TensorRT fuses."""
    import onnx
    from onnx import TensorProto, helper

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


def contexts(module: str, engine: bytes, shape: tuple[int, int, int], count: int, x: int, y: int) -> list[Any]:
    """Execution contexts of `count` engines, so that each has weights of its own. Raises Int4Error.

    Args:
        module: "tensorrt" or "tensorrt_rtx".
        engine: What `build` made.
        shape: in_features, out_features and tokens.
        count: How many.
        x: Address of the input.
        y: Address of the output.
    """
    trt: Any = import_module(module)
    runtime, made = trt.Runtime(trt.Logger(trt.Logger.ERROR)), []
    for _ in range(count):
        loaded = runtime.deserialize_cuda_engine(engine)
        if loaded is None:
            raise Int4Error("the engine cannot be loaded")
        made.append(loaded.create_execution_context())
        made[-1].set_input_shape("x", (1, shape[2], shape[0]))
        made[-1].set_tensor_address("x", x)
        made[-1].set_tensor_address("y", y)
    return made


def _row(gpu: Gpu, module: str, k: int, n: int, tokens: int, beyond: int) -> dict[str, Any]:
    """Median time of one product with cold weights. Raises Int4Error."""
    count = shapes.copies(k * n // 2, beyond)
    engine = build(module, weight_only_model(k, n), k, tokens)
    sizes = 2 * tokens * k, 2 * tokens * n
    with gpu.arena(sum(round_up(size, ALIGNMENT) for size in sizes)) as arena:
        x, y = (arena.take(size) for size in sizes)
        gpu.fill(x, 0, sizes[0])
        run = contexts(module, engine, (k, n, tokens), count, x, y)
        taken = gpu.graph_time(lambda: [context.execute_async_v3(gpu.stream.value) for context in run])
    return {"k": k, "n": n, "tokens": tokens, "copies": count, "bytes": k * n // 2 + sum(sizes),
            "microseconds": taken / count}  # fmt: skip


def rows(deadline: float, beyond: int) -> Iterator[dict[str, Any]]:
    """Products until `deadline` (of time.monotonic), or {"what": ..., "skipped": why}."""
    module = library()
    if module is None:
        return
    gpu = Gpu(None, Driver())
    for tokens in TOKENS:
        for model, pairs in shapes.MODELS.items():
            for k, n in pairs:
                what = f"{k} x {n} at {tokens} tokens"
                if time.monotonic() > deadline:
                    yield {"what": f"{what} and what follows", "skipped": "The time was up."}
                    return
                try:
                    yield {"model": model, **_row(gpu, module, k, n, tokens, beyond)}
                except (Int4Error, DeviceError) as error:
                    yield {"what": what, "skipped": str(error)}
                    return


def missing() -> str | None:
    """Why it cannot be timed here, or None."""
    if library() is None:
        return "TensorRT's Python module is not installed."
    return None if find_spec("onnx") else "onnx is not installed."
