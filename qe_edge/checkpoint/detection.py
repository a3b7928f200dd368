"""Tells a quantized checkpoint of ours from other folders, without torch."""

from __future__ import annotations

from pathlib import Path

from qe_edge.system.errors import ArtifactError
from qe_edge.system.json_files import read_json_table

QUANT_METHOD = "qe-edge"  # quant_method of our own checkpoints


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a quantized checkpoint; reads its config.json only.

    Example:
        >>> Path("plain").mkdir()
        >>> _ = Path("plain/config.json").write_text('{"model_type": "llama"}')
        >>> is_checkpoint(Path("plain")), is_checkpoint(Path("no-such-folder"))
        (False, False)
    """
    try:
        section = read_json_table(folder / "config.json").get("quantization_config")
    except ArtifactError:
        return False
    return isinstance(section, dict) and section.get("quant_method") == QUANT_METHOD
