"""Names of the files that decide what a model computes, and their kinds in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

# What the libraries read when a folder is opened, if it is there.
CONFIGURATION = frozenset({
    "adapter_config.json", "added_tokens.json", "additional_chat_templates", "chat_template.jinja",
    "chat_template.json", "config.json", "generation_config.json", "merges.txt", "model.safetensors.index.json",
    "preprocessor_config.json", "processor_config.json", "sentencepiece.bpe.model", "special_tokens_map.json",
    "spiece.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "video_preprocessor_config.json",
    "vocab.json", "vocab.txt",
})  # fmt: skip
TEMPLATES = "additional_chat_templates"
ADAPTER = "vision-lora"  # a folder: transformers' documentation loads it beside Phi-4-multimodal, for pictures


def model_files(folder: Path) -> list[str]:
    """Names of the files that decide what a model computes: weights, configuration, tokenizer and templates.

    Example:
        >>> Path("model").mkdir()
        >>> for name in ("config.json", "model.safetensors", "README.md"):
        ...     _ = Path("model", name).write_bytes(b"")
        >>> model_files(Path("model"))
        ['config.json', 'model.safetensors']
    """
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and (path.name in CONFIGURATION or path.suffix == ".safetensors")
    ]
    templates = sorted((folder / TEMPLATES).glob("*.jinja"))
    adapter = sorted(path for path in (folder / ADAPTER).glob("adapter_*") if path.suffix in (".json", ".safetensors"))
    return [path.relative_to(folder).as_posix() for path in (*files, *templates, *adapter)]


def part_in_words(name: str) -> str:
    """The kind and name of a file of a model, for messages.

    Example:
        >>> part_in_words("model-00001-of-00002.safetensors"), part_in_words("vocab.json")
        ("weights: 'model-00001-of-00002.safetensors'", "tokenizer: 'vocab.json'")
    """
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


def work_folder(output: Path) -> Path:
    """The folder of a checkpoint's finished blocks until the checkpoint is complete.

    Example:
        >>> work_folder(Path("out/checkpoint")).as_posix()
        'out/checkpoint.work'
    """
    return output.with_name(f"{output.name}.work")
