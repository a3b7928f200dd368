"""What the user points at: a model, or the output of any stage from which the wanted one can be found.

`OUT` of `qe-edge deploy` holds `checkpoint`, `onnx`, `engines/<target>` and `report.json`; every command that reads one
of those also takes `OUT`.
"""

from __future__ import annotations

import json
from pathlib import Path

from qe_edge.errors import ArtifactError, ModelError

CHECKPOINT, ONNX, ENGINES, REPORT = "checkpoint", "onnx", "engines", "report.json"


def open_model(reference: str) -> str:
    """Folder or hub id of an original model, with its files checked.

    Raises:
        ModelError: If there is none, or it is quantized already.
        ArtifactError: If a file is damaged.
    """
    from qe_edge.models.loading import resolve_model

    folder = Path(reference)
    for quantized in (folder, folder / CHECKPOINT):
        if is_checkpoint_folder(quantized):
            raise ModelError(f"'{reference}' is quantized already.", "Give the original model.")
    return resolve_model(reference)


def is_checkpoint_folder(folder: Path) -> bool:
    """Whether a folder holds a quantized checkpoint; reads its config.json only."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    section = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(section, dict) and section.get("quant_method") == "qe-edge"


def is_onnx_folder(folder: Path) -> bool:
    """Whether a folder holds exported graphs."""
    return (folder / "language.onnx").is_file()


def find_checkpoint(path: Path) -> Path:
    """The quantized checkpoint that `path` is or contains.

    Raises:
        ArtifactError: If there is none.
    """
    for folder in (path, path / CHECKPOINT):
        if is_checkpoint_folder(folder):
            return folder
    raise _not_found(path, "quantized checkpoint", "qe-edge quantize MODEL -o DIR")


def _not_found(path: Path, wanted: str, made_by: str) -> ArtifactError:
    what = f"'{path}' holds no {wanted}" if path.exists() else f"There is no folder '{path}'"
    return ArtifactError(f"{what}.", f"Make one with '{made_by}'.")
