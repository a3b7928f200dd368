"""Building TensorRT engines, with TensorRT or TensorRT-RTX, whose Python interfaces are the same."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from qe_edge.models.family import Profile
from qe_edge.runtime.engine_info import Backend
from qe_edge.system.child_process import isolated_code, isolated_module, safe_environment
from qe_edge.system.errors import ResourceError, TargetError

CHILD = "qe_edge.export.engine_child"
RTX_LIBRARY = "libtensorrt_rtx.so"
ASK = """
import {backend} as trt
logger = trt.Logger(trt.Logger.ERROR)
network = trt.Builder(logger).create_network(0)
raise SystemExit(not trt.OnnxParser(network, logger).supports_operator({operator!r}))
"""
REMEDY = "Try another version of TensorRT, or build for the target 'cpu'."


@dataclass(frozen=True)
class EngineRequest:
    """One engine to build.

    Attributes:
        backend: "tensorrt" or "tensorrt_rtx".
        onnx: Lowered graph, with its external data beside it.
        engine: File to write.
        facts: File for the facts of the build, which the builder's process writes.
        profiles: Optimization profiles, in order.
        capabilities: Compute capabilities to build for, where the backend builds for other machines.
        plugin_library: The plugin's library, if the graph has its nodes.
    """

    backend: Backend
    onnx: Path
    engine: Path
    facts: Path
    profiles: dict[str, Profile]
    capabilities: tuple[tuple[int, int], ...] = ()
    plugin_library: Path | None = None


@dataclass(frozen=True)
class EngineFacts:
    """Facts of a build.

    Attributes:
        version: Version of the library.
        errors: Errors of the library; empty if the engine was built.
        remedy: Remedy for the first error, if that is not about the graph.
        seconds: Time to parse and build.
        size: Bytes of the engine.
        layers: Layers of the parsed network.
        plugin_nodes: Names of the network's layers that the plugin runs.
        engine_layers: Layers of the built engine by name with their kind; empty where the builder does not list them.
    """

    version: str
    errors: list[str] = field(default_factory=list)
    remedy: str = ""
    seconds: float = 0.0
    size: int = 0
    layers: int = 0
    plugin_nodes: list[str] = field(default_factory=list)
    engine_layers: dict[str, str] = field(default_factory=dict)


def build_engine(request: EngineRequest) -> EngineFacts:
    """Build one engine in a child process.

    Raises:
        TargetError: If the library refuses the graph, or crashes.
        ResourceError: If the builder was killed, most often for want of memory.

    Example:
        >>> files = Path("lowered.onnx"), Path("language.engine"), Path("facts.json")  # doctest: +SKIP
        >>> build_engine(EngineRequest("tensorrt", *files, profiles={})).layers  # doctest: +SKIP
    """
    process = subprocess.run(
        isolated_module(CHILD),
        input=TypeAdapter(EngineRequest).dump_json(request),
        capture_output=True,
        check=False,
        env=_environment(request),
    )
    name = request.onnx.stem
    if process.returncode == -signal.SIGKILL:
        raise ResourceError(
            f"Building the engine of '{name}' was killed, most likely for want of memory.",
            "Close other programs, or build on a machine with more memory.",
        )
    if process.returncode != 0:
        lines = process.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"exit code {process.returncode}"
        raise TargetError(f"{request.backend} crashed while building '{name}': {reason}", REMEDY)
    try:
        facts = TypeAdapter(EngineFacts).validate_json(request.facts.read_bytes())
    except (OSError, ValidationError) as error:
        raise TargetError(f"{request.backend} built '{name}' and reported nothing.", REMEDY) from error
    finally:
        request.facts.unlink(missing_ok=True)
    if facts.errors and facts.remedy:
        raise TargetError(facts.errors[0], facts.remedy)
    if facts.errors:
        raise TargetError(f"{request.backend} refuses the graph '{name}': {_first_line(facts.errors)}", REMEDY)
    return facts


def reads_operator(backend: Backend, operator: str) -> bool:
    """Whether a library's parser knows an operator; a library that does not start knows none.

    Example:
        >>> reads_operator("tensorrt", "TensorScatter")  # doctest: +SKIP
    """
    code = ASK.format(backend=backend, operator=operator)
    asked = subprocess.run(isolated_code(code), capture_output=True, check=False, env=safe_environment())
    return asked.returncode == 0


def _environment(request: EngineRequest) -> dict[str, str]:
    """The child's environment, in which TensorRT-RTX's parser finds plugins.

    For plugins it opens `libtensorrt_rtx.so`, a name that its wheel lacks (it has `libtensorrt_rtx.so.1`), and aborts
    if there is none. So we put a link of that name into a folder on the loader's path.
    """
    environment = safe_environment()
    found = find_spec("tensorrt_rtx_libs") if request.plugin_library and request.backend == "tensorrt_rtx" else None
    for folder in (found.submodule_search_locations or []) if found else []:
        for library in sorted(Path(folder).glob(f"{RTX_LIBRARY}.*")):
            links = request.facts.parent.absolute() / "lib"
            links.mkdir(exist_ok=True)
            (links / RTX_LIBRARY).unlink(missing_ok=True)
            (links / RTX_LIBRARY).symlink_to(library)
            others = [environment["LD_LIBRARY_PATH"]] if environment.get("LD_LIBRARY_PATH") else []
            environment["LD_LIBRARY_PATH"] = os.pathsep.join([str(links), *others])
    return environment


def _first_line(errors: list[str]) -> str:
    """The first line that says something, at most 300 characters."""
    lines = [line.strip() for error in errors for line in error.splitlines() if line.strip()]
    return lines[0][:300] if lines else "it gives no reason"
