"""The targets that were built: their sizes, their plugin nodes, and whether they ran here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qe_edge.budget.accounting import file_sizes
from qe_edge.runtime.engine_info import EngineInfo, read_engine_info
from qe_edge.validate.schema import TargetState

BACKENDS = {"onnxruntime_cuda": "ONNX Runtime, CUDA,", "tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}


def target_states(validated: Path | None, not_run: Sequence[Path]) -> list[TargetState]:
    """Describe targets by their names. A folder without a build, such as one of graphs, goes by its own name.

    Raises:
        ArtifactError: If the description of an engine is damaged.

    Example:
        >>> Path("graphs").mkdir()
        >>> target_states(None, not_run=[Path("graphs")])
        [TargetState(name='graphs', size=0, validated=False, plugin_nodes=0)]
    """
    folders = ([(validated, True)] if validated else []) + [(folder, False) for folder in not_run]
    return [
        TargetState(
            name=info.target if info else folder.resolve().name,
            size=sum(file.size for file in file_sizes("engines", folder)),
            validated=ran,
            plugin_nodes=plugin_nodes(info),
        )
        for folder, ran, info in ((folder, ran, read_engine_info(folder)) for folder, ran in folders)
    ]


def plugin_nodes(info: EngineInfo | None) -> int:
    """Return the number of nodes of a target's engines that the plugin runs.

    Example:
        >>> plugin_nodes(None)  # a folder of graphs for ONNX Runtime: it needs no plugin
        0
    """
    return sum(len(graph.plugin_nodes) for graph in info.graphs.values()) if info else 0


def runtime_name(info: EngineInfo | None) -> str:
    """Return the name of an engine's runtime in reports: "ONNX Runtime", or TensorRT with its version.

    Example:
        >>> runtime_name(None)
        'ONNX Runtime'
    """
    if info is None or info.backend not in BACKENDS:
        return "ONNX Runtime"
    return f"{BACKENDS[info.backend]} {info.version}{' with the plugin' if info.plugin else ''}"
