"""Build an engine with TensorRT-RTX on the CPU, in a process of its own.

    python -m tests.trt_build MODEL.onnx LIB.so

Prints one JSON object: parsed, errors, engine_bytes, layers, messages. TensorRT aborts the process on some errors, so
the test that calls this looks at the exit code too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def link_plain_name(folder: Path) -> None:
    """The parser opens libtensorrt_rtx.so, and the wheel has only libtensorrt_rtx.so.1: give it the plain name."""
    import tensorrt_rtx_libs

    target = next(Path(next(iter(tensorrt_rtx_libs.__path__))).glob("libtensorrt_rtx.so.*"))
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "libtensorrt_rtx.so"
    if not link.exists():
        link.symlink_to(target)


def build(model: bytes, library: str) -> dict[str, Any]:
    """Parse and build; the engine serves 1 to 64 tokens."""
    import tensorrt_rtx as trt

    messages: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc] # the extension module has no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:  # noqa: ANN401 - TensorRT has no types
            if severity in (trt.Logger.INTERNAL_ERROR, trt.Logger.ERROR) or "QELinear" in message:
                messages.append(message)

    logger = Logger()
    trt.get_plugin_registry().load_library(library)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(model)
    result: dict[str, Any] = {"parsed": parsed, "errors": [str(parser.get_error(i)) for i in range(parser.num_errors)]}
    result["layers"] = [
        [network.get_layer(i).name, str(network.get_layer(i).type).split(".")[-1]] for i in range(network.num_layers)
    ]
    result["engine_bytes"] = 0
    if parsed:
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        profile = builder.create_optimization_profile()
        features = network.get_input(0).shape[-1]
        profile.set_shape(network.get_input(0).name, (1, 1, features), (1, 16, features), (1, 64, features))
        config.add_optimization_profile(profile)
        engine = builder.build_serialized_network(network, config)
        result["engine_bytes"] = 0 if engine is None else engine.nbytes
    result["messages"] = messages[:20]
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description="Build an engine with the plugin on the CPU.")
    parser.add_argument("model", type=Path)
    parser.add_argument("library")
    arguments = parser.parse_args()
    folder = Path(os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)[0] or ".")
    link_plain_name(folder)
    print(json.dumps(build(arguments.model.read_bytes(), arguments.library)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
