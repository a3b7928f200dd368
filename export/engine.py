"""Building TensorRT engines, with TensorRT or TensorRT-RTX, whose Python interfaces are the same."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from qe_edge.errors import ResourceError, TargetError
from qe_edge.export.targets import Backend
from qe_edge.models.family import Profile

REMEDY = "Try another version of TensorRT, or build for the target 'cpu'."


@dataclass(frozen=True)
class EngineRequest:
    """What to build.

    Attributes:
        backend: "tensorrt" or "tensorrt_rtx".
        onnx: Lowered graph, with its external data beside it.
        engine: File to write.
        facts: File in which the builder's process tells how it went.
        profiles: Optimization profiles, in order.
        capabilities: Compute capabilities to build for, where the backend builds for other machines.
    """

    backend: Backend
    onnx: Path
    engine: Path
    facts: Path
    profiles: dict[str, Profile]
    capabilities: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class EngineFacts:
    """How a build went.

    Attributes:
        version: Of the library.
        errors: What the library complained about; empty if the engine was built.
        seconds: Time to parse and build.
        size: Bytes of the engine.
        layers: Layers of the parsed network.
    """

    version: str
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0
    size: int = 0
    layers: int = 0


def build_engine(request: EngineRequest) -> EngineFacts:
    """Build one engine in a child process.

    Raises:
        TargetError: If the library refuses the graph, or crashes.
        ResourceError: If the builder was killed, most often for want of memory.
    """
    process = subprocess.run(
        [sys.executable, "-m", "qe_edge.export.engine_child"],
        input=TypeAdapter(EngineRequest).dump_json(request),
        capture_output=True,
        check=False,
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
    if facts.errors:
        raise TargetError(f"{request.backend} refuses the graph '{name}': {_first_line(facts.errors)}", REMEDY)
    return facts


def _first_line(errors: list[str]) -> str:
    return errors[0].strip().splitlines()[0]
