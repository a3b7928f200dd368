"""What the type of the KV cache costs and saves: ONNX Runtime's attention node alone, at Qwen2-VL-2B's shapes.

    python benchmarks/cache_types.py

One layer, 12 heads of queries over 2 of keys, 128 wide, one thread. float16 needs casts around the node, which computes
in the type of its queries; int8 has static scales, one a channel. Times are CPU time, medians of `--repeats`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, TensorProto, helper, numpy_helper

HEADS, KV_HEADS, WIDTH, CAPACITY = 12, 2, 128, 2048
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int8": TensorProto.INT8}
CALLS = {"one token after 64": (1, 64), "one token after 1024": (1, 1024), "a prompt of 1024": (1024, 0)}


def main() -> None:
    """Print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    found = {name: {call: measure(name, *sizes, repeats) for call, sizes in CALLS.items()} for name in TYPES}
    print(f"{'cache':<10}{'bytes a token':>15}" + "".join(f"{call:>24}" for call in CALLS))
    for name, times in found.items():
        size = 2 * KV_HEADS * WIDTH * np.dtype(name).itemsize
        print(f"{name:<10}{size:>15}" + "".join(f"{times[call]:>21.0f} us" for call in CALLS))
    print(json.dumps({"script": "cache_types", "onnxruntime": ort.__version__, "microseconds": found}))


def measure(name: str, tokens: int, past: int, repeats: int) -> float:
    """Median microseconds of a call that feeds `tokens` after `past` ones."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(graph(name).SerializeToString(), options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    feeds = {
        key: random.standard_normal((1, tokens, heads * WIDTH)).astype(np.float32)
        for key, heads in (("query", HEADS), ("key", KV_HEADS), ("value", KV_HEADS))
    }
    shape = (1, KV_HEADS, CAPACITY, WIDTH)
    spread = 40 if name == "int8" else 1
    cache = {part: (spread * random.standard_normal(shape)).astype(name) for part in ("past_key", "past_value")}
    feeds |= {"last": np.array([past + tokens - 1], np.int32), "total": np.array([past + tokens], np.int32)}
    times = []
    for _ in range(repeats):
        binding = session.io_binding()
        for key, array in {**feeds, **cache}.items():
            binding.bind_cpu_input(key, array)
        binding.bind_output("mixed")
        for key, array in cache.items():  # written in place
            binding.bind_output(key.replace("past", "present"), "cpu", 0, array.dtype, shape, array.ctypes.data)
        start = time.process_time()
        session.run_with_iobinding(binding)
        times.append(time.process_time() - start)
    return 1e6 * statistics.median(times)


def graph(name: str) -> ModelProto:
    """The node with a cache of a type, and what it needs around it; queries, keys and values are float32."""
    operands, computed, further = ["query", "key", "value"], "mixed", {}
    before, after, constants = [], [], []
    scales = []
    if name == "float16":
        before = [helper.make_node("Cast", [key], [f"{key}_half"], to=TYPES[name]) for key in operands]
        after = [helper.make_node("Cast", ["mixed_half"], ["mixed"], to=TensorProto.FLOAT)]
        operands, computed = [f"{key}_half" for key in operands], "mixed_half"
    if name == "int8":
        scale = np.full(KV_HEADS * WIDTH, 4 / 127, np.float32)
        constants = [numpy_helper.from_array(scale, f"{part}_scale") for part in ("key", "value")]
        scales = ["", "", "", "", "", "key_scale", "value_scale"]
        further = {"kv_cache_bit_width": 8, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
    node = helper.make_node(
        "GroupQueryAttention",
        [*operands, "past_key", "past_value", "last", "total", *scales],
        [computed, "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=KV_HEADS,
        **further,
    )
    real, whole = TensorProto.FLOAT, TensorProto.INT32
    inputs = [
        helper.make_tensor_value_info(key, real, [1, "tokens", heads * WIDTH])
        for key, heads in (("query", HEADS), ("key", KV_HEADS), ("value", KV_HEADS))
    ]
    cached = [1, KV_HEADS, CAPACITY, WIDTH]
    inputs += [helper.make_tensor_value_info(f"past_{part}", TYPES[name], cached) for part in ("key", "value")]
    inputs += [helper.make_tensor_value_info(key, whole, [1]) for key in ("last", "total")]
    outputs = [helper.make_tensor_value_info("mixed", real, [1, "tokens", HEADS * WIDTH])]
    outputs += [helper.make_tensor_value_info(f"present_{part}", TYPES[name], cached) for part in ("key", "value")]
    body = helper.make_graph([*before, node, *after], "attention", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(body, opset_imports=opsets, ir_version=10)


if __name__ == "__main__":
    main()
