"""Files of every stage and their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qe_edge.budget.accounting import FileSize, file_sizes
from qe_edge.validate.schema import Role

STAGE_OF: dict[Role, str] = {"original": "original", "quantized": "checkpoint", "engine": "engines"}


def stage_sizes(original: str, checkpoint: Path, onnx: Path | None, engines: Path | None) -> list[FileSize]:
    """Files of every stage that is a folder on this machine; a hub id has none.

    Example:
        >>> Path("checkpoint").mkdir()
        >>> _ = Path("checkpoint/model.safetensors").write_bytes(bytes(100))
        >>> stage_sizes("hub/model", Path("checkpoint"), onnx=None, engines=None)
        [FileSize(stage='checkpoint', name='model.safetensors', size=100)]
    """
    folders = {"original": Path(original), "checkpoint": checkpoint, "onnx": onnx, "engines": engines}
    present = {stage: folder for stage, folder in folders.items() if folder is not None and folder.is_dir()}
    return [file for stage, folder in present.items() for file in file_sizes(stage, folder)]


def model_size(sizes: Sequence[FileSize], role: Role) -> int | None:
    """Bytes of all files of a model's folder, or None if it is no folder.

    Example:
        >>> sizes = [FileSize(stage="checkpoint", name="model.safetensors", size=100)]
        >>> model_size(sizes, "quantized"), model_size(sizes, "original")
        (100, None)
    """
    return sum(file.size for file in sizes if file.stage == STAGE_OF[role]) or None
