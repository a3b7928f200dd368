"""Writes the description of a folder again after a test, or a stranger who knows the format, changed its files."""

from __future__ import annotations

import json
from pathlib import Path

from qe_edge.checkpoint.files import FILES, CheckpointFiles
from qe_edge.checkpoint.integrity import describe
from qe_edge.runtime.engine_info import ENGINE_INFO, EngineInfo
from qe_edge.runtime.manifest import MANIFEST, Manifest


def seal(folder: Path) -> None:
    """Make the hashes of a checkpoint, ONNX or engine folder those of the files that lie there."""
    if (folder / FILES).is_file():
        origin = json.loads((folder / FILES).read_text(encoding="utf-8"))["origin"]
        files = describe(folder, lambda name: name != FILES)
        CheckpointFiles(origin=origin, files=files).write_sealed(folder / FILES)
    if (folder / MANIFEST).is_file():
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes()).write(folder)
        if (folder / ENGINE_INFO).is_file():
            info = EngineInfo.model_validate_json((folder / ENGINE_INFO).read_bytes())
            info.model_copy(update={"manifest": manifest.digest}).write(folder)
