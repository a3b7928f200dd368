"""Builds one TensorRT engine in a process of its own: `python -m qe_edge.export.engine_child < request.json`.

A builder that crashes takes this process with it and not the caller's.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from qe_edge.export.engine import EngineFacts, EngineRequest
from qe_edge.runtime.plugin_library import load_plugin_library
from qe_edge.system.errors import TargetError

LAYER = re.compile(r"^Name: ([^,\n]+), LayerType: (\w+)", re.MULTILINE)  # of the verbose list; needs no GPU


def build(request: EngineRequest) -> EngineFacts:
    """Parse, optimise and serialize; problems are in `EngineFacts.errors`.

    Example:
        >>> files = Path("lowered.onnx"), Path("language.engine"), Path("facts.json")  # doctest: +SKIP
        >>> build(EngineRequest("tensorrt", *files, profiles={})).errors  # doctest: +SKIP
    """
    trt = importlib.import_module(request.backend)
    logger = _collecting_logger(trt)
    started = time.perf_counter()
    builder = trt.Builder(logger)
    if request.plugin_library is not None:
        try:
            load_plugin_library(trt, request.plugin_library)
        except TargetError as error:
            return EngineFacts(version=trt.__version__, errors=[error.problem], remedy=error.remedy)
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(request.onnx)):
        errors = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        return EngineFacts(version=trt.__version__, errors=[*errors, *logger.errors])
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # what runs in float32 does so because it must be exact
    if request.plugin_library is not None:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the layer list gets names
    for shapes in request.profiles.values():
        profile = builder.create_optimization_profile()
        for name, (smallest, typical, largest) in shapes.items():
            profile.set_shape(name, smallest, typical, largest)
        if config.add_optimization_profile(profile) < 0:
            return EngineFacts(version=trt.__version__, errors=logger.errors or ["an optimization profile is invalid"])
    if request.capabilities and hasattr(config, "num_compute_capabilities"):  # TensorRT-RTX builds for other machines
        config.num_compute_capabilities = len(request.capabilities)
        for index, (major, minor) in enumerate(request.capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{major}{minor}"), index)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        return EngineFacts(version=trt.__version__, errors=logger.errors or ["no engine was built"])
    request.engine.write_bytes(serialized)
    return EngineFacts(
        version=trt.__version__,
        seconds=time.perf_counter() - started,
        size=request.engine.stat().st_size,
        layers=network.num_layers,
        plugin_nodes=_plugin_nodes(network),
        engine_layers=logger.layers,
    )


def _plugin_nodes(network: Any) -> list[str]:  # noqa: ANN401
    """Names of the layers that are plugins."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return [layer.name for layer in layers if str(layer.type).rpartition(".")[2].startswith("PLUGIN")]


def _strongly_typed(trt: Any) -> int:  # noqa: ANN401 - an untyped extension module
    """Creation flag of a network whose types are the graph's; later versions know nothing else."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _collecting_logger(trt: Any) -> Any:  # noqa: ANN401
    class Logger(trt.ILogger):  # type: ignore[misc] # the extension module has no types
        """Keeps errors for the message to the user, and the list of the built engine's layers."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.layers: dict[str, str] = {}

        def log(self, severity: Any, message: str) -> None:  # noqa: ANN401
            if severity in (trt.Logger.INTERNAL_ERROR, trt.Logger.ERROR):
                self.errors.append(message)
            elif message.startswith(("Layers:", "Engine Layer Information:")):
                self.layers |= dict(LAYER.findall(message))

    return Logger()


if __name__ == "__main__":
    wanted = TypeAdapter(EngineRequest).validate_json(sys.stdin.read())
    facts = TypeAdapter(EngineFacts).dump_python(build(wanted), mode="json")
    Path(wanted.facts).write_text(json.dumps(facts), encoding="utf-8")
