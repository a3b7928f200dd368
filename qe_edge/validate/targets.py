"""What was built, what it needs, and whether it ran here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qe_edge.budget.accounting import file_sizes
from qe_edge.runtime.engine_info import EngineInfo, read_engine_info
from qe_edge.validate.schema import TargetState

BACKENDS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}


def target_states(validated: Path | None, not_run: Sequence[Path]) -> list[TargetState]:
    """Targets by their names; a folder that says nothing of a target, such as one of graphs, by its own.

    Raises:
        ArtifactError: If the description of an engine is damaged.
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
    """How many nodes of a target's engines the plugin runs."""
    return sum(len(graph.plugin_nodes) for graph in info.graphs.values()) if info else 0


def runtime_name(info: EngineInfo | None) -> str:
    """What runs an engine, as the report calls it: "ONNX Runtime", or TensorRT with its version."""
    if info is None or info.backend not in BACKENDS:
        return "ONNX Runtime"
    return f"{BACKENDS[info.backend]} {info.version}{' with the plugin' if info.plugin else ''}"
