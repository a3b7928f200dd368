"""Hashes that tell whether a file, a folder or a model is still the one that a run was made from.

Hashing streams every file once, at about 2 GB/s on one core if the disk keeps up.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qe_edge.models.loading import LoadedModel

CHUNK = 1 << 20
# What the libraries read when a folder is opened, if it is there.
CONFIGURATION = frozenset({
    "adapter_config.json", "added_tokens.json", "additional_chat_templates", "chat_template.jinja",
    "chat_template.json", "config.json", "generation_config.json", "merges.txt", "model.safetensors.index.json",
    "preprocessor_config.json", "processor_config.json", "sentencepiece.bpe.model", "special_tokens_map.json",
    "spiece.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "video_preprocessor_config.json",
    "vocab.json", "vocab.txt",
})  # fmt: skip
TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class FileDigest:
    """One file.

    Attributes:
        size: Bytes.
        sha256: Hash of its content.
    """

    size: int
    sha256: str

    @classmethod
    def parse(cls, values: object) -> FileDigest | None:
        """The digest in a JSON table; None if there is none."""
        if not isinstance(values, dict) or values.keys() != {"size", "sha256"}:
            return None
        size, sha256 = values["size"], values["sha256"]
        return cls(size, sha256) if isinstance(size, int) and isinstance(sha256, str) else None

    def as_json(self) -> dict[str, Any]:
        """The table that `parse` reads."""
        return asdict(self)

    def matches(self, path: Path) -> bool:
        """Whether a file is there with this size and this content; the size is compared first."""
        return path.is_file() and path.stat().st_size == self.size and file_digest(path) == self


def file_digest(path: Path) -> FileDigest:
    """Size and hash of a file, read in pieces of 1 MiB."""
    found, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found.update(buffer[:count])
            size += count
    return FileDigest(size, found.hexdigest())


def folder_digests(folder: Path) -> dict[str, FileDigest]:
    """Size and hash of every file below a folder, by its name relative to the folder."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: file_digest(folder / name) for name in names}


def hash_parts(*parts: object) -> str:
    """One hash of several values, each of which JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def model_parts(model: str | LoadedModel) -> dict[str, str]:
    """What a model consists of: a hash of every file of a folder, or the commit of a hub's model.

    Of a model that was made or changed in Python: all tensors, configuration, generation settings, and every file that
    its tokenizer and image processor would be saved as.

    Args:
        model: "demo", a folder, a hub id, or a model in memory.

    Returns:
        A hash by the part's name, which is a file name where there is a file.

    Raises:
        ModelError: If there is no such model.
    """
    if not isinstance(model, str):
        return _parts_in_memory(model)
    from qe_edge.models.configuration import load_config
    from qe_edge.models.loading import resolve_model

    source = resolve_model(model)
    folder = Path(source)
    if not folder.is_dir():
        return {"hub id": source, "revision": str(getattr(load_config(source), "_commit_hash", None))}
    return {name: file_digest(folder / name).sha256 for name in model_files(folder)}


def model_files(folder: Path) -> list[str]:
    """Names of the files that decide what a model computes: weights, configuration, tokenizer and templates."""
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and (path.name in CONFIGURATION or path.suffix == ".safetensors")
    ]
    templates = sorted((folder / TEMPLATES).glob("*.jinja"))
    return [path.relative_to(folder).as_posix() for path in (*files, *templates)]


def model_fingerprint(model: str | LoadedModel) -> str:
    """One hash of all `model_parts`.

    Raises:
        ModelError: If there is no such model.
    """
    return hash_parts(model_parts(model))


def _parts_in_memory(loaded: LoadedModel) -> dict[str, str]:
    import torch

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


def part_in_words(name: str) -> str:
    """What a part of a model is, and its name, for messages."""
    kinds: Mapping[str, tuple[str, ...]] = {
        "weights": (".safetensors",),
        "chat template": (".jinja", "chat_template.json"),
        "image processor": ("processor_config.json",),
        "generation settings": ("generation_config.json",),
        "tokenizer": ("tokens_map.json", "tokens.json", "merges.txt", "vocab.json", "vocab.txt", ".model", ".tiktoken"),
    }
    kind = next((kind for kind, endings in kinds.items() if name.endswith(endings)), None)
    if kind is None and name.startswith("tokenizer"):
        kind = "tokenizer"
    if kind is None:
        kind = "configuration" if name == "config.json" else "model"
    return f"{kind}: '{name}'"
