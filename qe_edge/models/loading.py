"""Finding and loading a model: demo name, local folder or hub id; everything is checked before weights are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from qe_edge.errors import ModelError, ResourceError
from qe_edge.models import FAMILIES
from qe_edge.models.family import ModelFamily
from qe_edge.safetensors_check import check_safetensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEMO = "demo"


@dataclass
class LoadedModel:
    """A model in memory.

    Attributes:
        model: transformers' own class, in evaluation mode.
        family: What QE-Edge knows about it.
        processor: Tokenizer and image processor, as `family.load_processor` returns them.
        source: Folder or hub id that it came from; tokenizer and processor files are copied from there.
    """

    model: PreTrainedModel
    family: ModelFamily
    processor: Any
    source: str


def resolve_model(reference: str) -> str:
    """Folder or hub id behind a model reference, with the folder's files checked.

    Raises:
        ModelError: If the folder or its files are missing.
        ArtifactError: If a safetensors file is damaged.
    """
    if reference == DEMO:
        from qe_edge.demo import model_path

        return str(model_path())
    folder = Path(reference)
    if folder.is_dir():
        _check_folder(folder)
        return str(folder)
    # 'owner/name' where a folder 'owner' lies here is a misspelt path, not a hub id
    is_path = folder.exists() or reference.startswith((".", "/", "~")) or folder.parent.is_dir()
    if is_path or reference.count("/") != 1:
        raise ModelError(
            f"There is no model folder '{reference}'.",
            "Give a folder with config.json, a hub id 'owner/name', or 'demo'.",
        )
    return reference


def load_config(source: str) -> Any:  # noqa: ANN401 - transformers' configuration classes
    """The model's configuration.

    Raises:
        ModelError: If it cannot be read, or is no model that QE-Edge knows.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"The configuration of '{source}' cannot be read: {reason}",
            "Check the spelling and the network, or download the model and give its folder.",
        ) from error
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"'{source}' is a '{config.model_type}' model, which QE-Edge does not support.",
            f"Supported: {', '.join(FAMILIES)}.",
        )
    return config


def load_family(source: str) -> ModelFamily:
    """The family of a model, from its configuration alone."""
    config = load_config(source)
    return FAMILIES[config.model_type](config)


def load_model(reference: str, dtype: torch.dtype | str = "auto") -> LoadedModel:
    """Load a model with transformers' own classes; remote code is never run.

    Args:
        reference: "demo", a folder or a hub id.
        dtype: Precision in memory; "auto" keeps the checkpoint's.

    Raises:
        ModelError: If the model cannot be loaded.
        ResourceError: If it does not fit into memory.
    """
    source = resolve_model(reference)
    family = load_family(source)
    check_memory(source, dtype)
    try:
        model: PreTrainedModel = auto_class(family).from_pretrained(source, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"'{source}' cannot be loaded: {str(error).splitlines()[0]}", "Check that the download is complete."
        ) from error
    return LoadedModel(model.eval(), family, family.load_processor(source), source)


def auto_class(family: ModelFamily) -> Any:  # noqa: ANN401 - transformers' auto classes share no public base
    """The class of transformers whose `from_pretrained` and `from_config` make the family's models."""
    import transformers

    return getattr(transformers, family.auto_class)


def check_memory(source: str, dtype: torch.dtype | str) -> None:
    """Refuse a local model whose weights alone exceed the free memory.

    Raises:
        ResourceError: If they do.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    needed = size * (2 if dtype == torch.float32 else 1)
    free = psutil.virtual_memory().available
    if needed > free:
        raise ResourceError(
            f"The model needs {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free.",
            "Use a machine with more memory; engines can be copied to the device afterwards.",
        )


def _check_folder(folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"'{folder}' has no config.json.", "Give the folder of a downloaded transformers model.")
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"'{config}' is not valid JSON: {error}.", "Download the file again.") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise ModelError(f"'{config}' names no model_type.", "Give the folder of a transformers model.")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(
            f"'{folder}' holds no .safetensors file.",
            "Convert the weights to safetensors; pickled weights are not loaded because they can run code.",
        )
    for path in weights:
        check_safetensors(path)
