"""Hashes that tell whether a model is still the one that a run was made from."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import torch

from qe_edge.checkpoint.known_files import model_files
from qe_edge.models.configuration import load_config
from qe_edge.models.loading import LoadedModel, resolve_model
from qe_edge.system.digests import file_digest, folder_digests, hash_parts


def model_parts(model: str | LoadedModel) -> dict[str, str]:
    """Return a hash of every part of a model: every file of a folder, or the commit of a hub's model.

    For a model in memory the parts are its tensors, its configuration, its generation settings, and every file that its
    tokenizer and image processor would be saved as.

    Args:
        model: "demo", a folder, a hub id, or a model in memory.

    Returns:
        A hash by the part's name, which is a file name where there is a file.

    Raises:
        ModelError: If there is no such model.

    Example:
        >>> sorted(model_parts("demo"))[:3]
        ['chat_template.jinja', 'config.json', 'generation_config.json']
    """
    if not isinstance(model, str):
        return _parts_in_memory(model)
    source = resolve_model(model)
    folder = Path(source)
    if not folder.is_dir():
        return {"hub id": source, "revision": str(getattr(load_config(source), "_commit_hash", None))}
    return {name: file_digest(folder / name).sha256 for name in model_files(folder)}


def _parts_in_memory(loaded: LoadedModel) -> dict[str, str]:
    weights = hashlib.sha256()
    for name, tensor in loaded.model.state_dict().items():
        value = loaded.stored.value(name, tensor).cpu().contiguous()
        weights.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        weights.update(value.reshape(-1).view(torch.uint8).numpy().data)
    configuration = loaded.family.config.to_json_string(use_diff=False)
    parts = {"weights": weights.hexdigest(), "configuration": hash_parts(configuration)}
    generation = getattr(loaded.model, "generation_config", None)
    if generation is not None:
        parts["generation settings"] = hash_parts(generation.to_json_string(use_diff=False))
    with tempfile.TemporaryDirectory(prefix="qe-edge-") as folder:
        loaded.family.save_processor(loaded.processor, Path(folder))
        parts |= {name: found.sha256 for name, found in folder_digests(Path(folder)).items()}
    return parts
