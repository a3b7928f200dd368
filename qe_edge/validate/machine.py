"""Description of the machine that a validation ran on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from qe_edge.validate.schema import Machine

BUSY = 2.0  # load per core; the validation itself causes up to one
LIBRARIES = ("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "onnx", "tensorrt", "tensorrt-rtx")


def describe_machine() -> Machine:
    """Operating system, processor, memory and library versions.

    Example:
        >>> machine = describe_machine()
        >>> machine.cores > 0, "torch" in machine.libraries
        (True, True)
    """
    return Machine(
        system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        processor=_processor(),
        cores=psutil.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        libraries={name: found for name in LIBRARIES if (found := _version(name))},
    )


def busy_note() -> str | None:
    """Return a warning if other programs load this machine so much that measured times are too long, else None.

    Example:
        >>> note = busy_note()
        >>> note is None or note.startswith("The machine was busy")
        True
    """
    load, cores = psutil.getloadavg()[0], psutil.cpu_count() or 1
    if load < BUSY * cores:
        return None
    return f"The machine was busy while speed was measured (load {load:.0f} on {cores} cores): times are too long."


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(names, platform.processor() or "unknown")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
