"""Checks, before any long work, that engines can decode a model as its generation_config.json says."""

from __future__ import annotations

from pathlib import Path

from transformers.utils.hub import cached_file

from qe_edge.models.configuration import load_family
from qe_edge.runtime.generation import GENERATION_CONFIG, read_settings


def check_decoding(source: str) -> None:
    """Refuse, before any long work, a model that no engine can decode as its generation_config.json says.

    Args:
        source: A model's or checkpoint's folder, or a hub id.

    Raises:
        ModelError: If it cannot be decoded, or the file is broken.

    Example:
        >>> from qe_edge.demo import model_path
        >>> check_decoding(str(model_path()))  # fine: engines can decode the demo
    """
    family = load_family(source)
    if not family.writes_text:
        return
    folder = Path(source)
    if not folder.is_dir():
        found = cached_file(source, GENERATION_CONFIG, _raise_exceptions_for_missing_entries=False)
        folder = Path(found).parent if found else folder
    read_settings(folder, family.config, family.load_processor(source).tokenizer)
