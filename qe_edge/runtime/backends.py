"""The graphs of a folder in the backend that they were built for, and whether this machine has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qe_edge.runtime.engine_info import EngineInfo, read_engine_info
from qe_edge.runtime.manifest import GraphEntry
from qe_edge.runtime.ort_cuda_session import OrtDeviceSession, open_device
from qe_edge.runtime.sessions import OrtSession, Session
from qe_edge.runtime.tensorrt_session import Device, TensorRTSession, check_device

OFTEN = ("language", "action")  # graphs that run many times for a prompt


def open_sessions(
    folder: Path,
    graphs: Mapping[str, GraphEntry],
    info: EngineInfo | None,
    threads: int | None,
    plugin_library: Path | None,
    accuracy_level: int = 0,
    *,
    cuda_graph: bool = False,
) -> dict[str, Session]:
    """The graphs of a folder in the backend that they were built for.

    Args:
        folder: The folder.
        graphs: Their entries of the manifest, by name.
        info: How they were built, None for graphs that were not.
        threads: For ONNX Runtime on the CPU: number of threads, None for all cores.
        plugin_library: For engines with the plugin: its library, None for the one that is found.
        accuracy_level: For ONNX Runtime on the CPU: 0 is exact.
        cuda_graph: For ONNX Runtime on a GPU: whether the language graph's steps are recorded.

    Raises:
        ArtifactError: If a graph is damaged.
        TargetError: If this machine cannot run them.

    Example:
        >>> from qe_edge.runtime.manifest import read_manifest
        >>> folder = Path("out/demo/engines/cpu")  # doctest: +SKIP
        >>> graphs = read_manifest(folder).graphs  # doctest: +SKIP
        >>> sessions = open_sessions(folder, graphs, read_engine_info(folder), None, None)  # doctest: +SKIP
    """
    if info is None or info.backend == "onnxruntime":
        return {
            name: OrtSession(folder, entry, accuracy_level, threads, frugal=name not in OFTEN)
            for name, entry in graphs.items()
        }
    if info.backend == "onnxruntime_cuda":
        gpu = open_device(info, plugin_library)
        return {
            name: OrtDeviceSession(folder, entry, gpu, steady=cuda_graph and name == "language")
            for name, entry in graphs.items()
        }
    device = Device(info, plugin_library)
    return {name: TensorRTSession(device, folder, entry) for name, entry in graphs.items()}


def check_runnable(folder: Path, plugin_library: Path | None = None) -> None:
    """Refuse engines that this machine cannot run, before any long work.

    Args:
        folder: An engine or ONNX folder.
        plugin_library: For engines with the plugin: its library, None for the one that is found.

    Raises:
        TargetError: If a GPU, a library or the plugin is missing.
        ArtifactError: If the folder's description is damaged.

    Example:
        >>> Path("onnx").mkdir()
        >>> check_runnable(Path("onnx"))  # fine: without engine.json these are graphs for ONNX Runtime
    """
    info = read_engine_info(folder)
    if info is None or info.backend == "onnxruntime":
        return
    if info.backend == "onnxruntime_cuda":
        open_device(info, plugin_library)
        return
    check_device(info, plugin_library)
