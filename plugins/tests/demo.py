"""The demo model as the ladder's rung "7 demo" leaves it: quantized, exported, and built with the plugin.

In W4A8, and in W3A16 below the folder "w3": its graphs are called "w3/language" here, and so on.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from emulator.build import BUILD

DEMO = BUILD / "demo"
ONNX, ENGINES, PACKED = DEMO / "onnx", DEMO / "engines", DEMO / "packed.onnx"


class DemoMissingError(FileNotFoundError):
    """The rung that makes the demo did not run."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of the demo."""
    if not path.is_file():
        raise DemoMissingError(f"{path} is missing. Run plugins/ladder.sh, whose rung '7 demo' makes it.")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def manifest(name: str) -> dict[str, Any]:
    """What the export says of one graph."""
    scheme, _, part = name.rpartition("/")
    return dict(read_json(DEMO / scheme / "onnx/manifest.json")["graphs"][part])


@lru_cache
def graph(name: str) -> onnx.ModelProto:
    """One exported graph with its weights."""
    manifest(name)
    scheme, _, part = name.rpartition("/")
    return onnx.load(str(DEMO / scheme / "onnx" / f"{part}.onnx"))


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """The model in ONNX Runtime, with exact products."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")  # or it quantizes x again
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def layer(name: str, node: str) -> onnx.ModelProto:
    """The model that consists of one exported layer, with the function that defines it."""
    model = graph(name)
    found = next(each for each in model.graph.node if each.name == node)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    weight = constants[found.input[1]].dims
    alone = helper.make_graph(
        [found], "layer",
        [helper.make_tensor_value_info(found.input[0], onnx.TensorProto.FLOAT, [1, "S", weight[0]])],
        [helper.make_tensor_value_info(found.output[0], onnx.TensorProto.FLOAT, [1, "S", weight[1]])],
        [constants[value] for value in found.input[1:] if value],
    )  # fmt: skip
    return helper.make_model(
        alone, opset_imports=model.opset_import, functions=model.functions, ir_version=model.ir_version
    )


def packed_layer(node: str) -> onnx.ModelProto:
    """One layer of the language model as `qe-edge build --plugin` gave it to TensorRT; siblings are joined."""
    if not PACKED.is_file():
        raise DemoMissingError(f"{PACKED} is missing. Run plugins/ladder.sh, whose rung '7 demo' makes it.")
    model = onnx.load(str(PACKED))
    found = next(each for each in model.graph.node if each.name == node)
    constants = [tensor for tensor in model.graph.initializer if tensor.name in found.input]
    return helper.make_model(helper.make_graph([found], "layer", [], [], constants))


def layer_inputs(name: str, node: str) -> NDArray[np.float32]:
    """What the layer reads inside the exported graph, ``[tokens, in_features]``, in values that float16 holds."""
    model = onnx.ModelProto()
    model.CopyFrom(graph(name))
    x = next(each for each in model.graph.node if each.name == node).input[0]
    model.graph.output.append(helper.make_tensor_value_info(x, onnx.TensorProto.FLOAT, None))
    profiles = manifest(name)["profiles"]
    shapes = {key: typical for key, (_, typical, _) in next(iter(profiles.values())).items()}
    rng, feeds = np.random.default_rng(0), {}
    running = session(model)
    for value in running.get_inputs():
        shape = shapes[value.name]
        real = rng.standard_normal(shape).astype(np.float32)
        feeds[value.name] = np.ones(shape, np.int64) if value.type == "tensor(int64)" else real
    found = running.run([x], feeds)[0]
    return np.asarray(found.reshape(-1, found.shape[-1]).astype(np.float16).astype(np.float32))
