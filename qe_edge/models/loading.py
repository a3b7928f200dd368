"""Finding and loading a model: demo name, local folder or hub id; everything is checked before weights are read."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn

from qe_edge.errors import ModelError, QENotice, ResourceError
from qe_edge.json_files import read_json_table
from qe_edge.models import FAMILIES
from qe_edge.models.family import ModelFamily
from qe_edge.models.stored import TORCH_DTYPES, Source, StoredWeights, placeholder, read_tensors
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
        stored: Weights that are on disk only until they are needed; none of a model that was loaded as a whole.
    """

    model: PreTrainedModel
    family: ModelFamily
    processor: Any
    source: str
    stored: StoredWeights = field(default_factory=StoredWeights)


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
    model = _from_pretrained(source, family, dtype)
    return LoadedModel(model, family, family.load_processor(source), source)


def load_outside_blocks(reference: str) -> LoadedModel:
    """Load a model without the weights of its blocks, which are read from their safetensors files when needed.

    A checkpoint whose tensors transformers does not only rename but also changes for this architecture is loaded as a
    whole, and so is one that is not in safetensors files.

    Args:
        reference: "demo", a folder or a hub id.

    Raises:
        ModelError: If the model cannot be loaded.
        ResourceError: If what has to be in memory does not fit.
    """
    source = resolve_model(reference)
    family = load_family(source)
    sources = _checkpoint_tensors(source, family)
    if sources is None:
        return _load_whole(reference, "its weights are in no safetensors files of known types")
    # which tensor of the file becomes which of the model only transformers knows: let it load placeholders
    given = {key: placeholder(shape, dtype) for key, (_, shape, dtype) in sources.items()}
    key_at = {tensor.data_ptr(): key for key, tensor in given.items()}
    with _quiet_transformers():
        model = _from_pretrained(source, family, "auto", dict(given))
    blocks = family.blocks(model)
    inside = {
        f"{block.name}.{name}": key_at.get(tensor.data_ptr())
        for block in blocks
        for name, tensor in block.module.state_dict().items()
    }
    if None in inside.values():
        changed = next(name for name, key in inside.items() if key is None)
        del model, blocks
        return _load_whole(reference, f"its files do not hold '{changed}' as transformers has it")
    _check_memory_outside(model, [block.module for block in blocks])
    del model, blocks
    keys = {name: key for name, key in inside.items() if key is not None}
    streamed = set(keys.values())
    outside = read_tensors({key: place for key, (place, _, _) in sources.items() if key not in streamed})
    model = _from_pretrained(source, family, "auto", {key: outside.pop(key, given[key]) for key in given})
    stored = StoredWeights(
        {name: sources[key][0] for name, key in keys.items()}, {name: given[key] for name, key in keys.items()}
    )
    return LoadedModel(model, family, family.load_processor(source), source, stored)


def _load_whole(reference: str, reason: str) -> LoadedModel:
    """The model in memory as a whole; the user is told why."""
    warnings.warn(f"All of '{reference}' is in memory at once, since {reason}.", QENotice, stacklevel=3)
    return load_model(reference)


def _from_pretrained(
    source: str, family: ModelFamily, dtype: torch.dtype | str, tensors: dict[str, torch.Tensor] | None = None
) -> PreTrainedModel:
    """The model in evaluation mode, from its files or from `tensors` in their stead."""
    from transformers.utils import logging as transformers_logging

    model: PreTrainedModel
    generation = Path(source) / "generation_config.json"
    if generation.exists() or generation.is_symlink():  # transformers would go on without a broken one
        read_json_table(generation, error=ModelError, remedy="Get it again from the original model, or delete it.")
    silent = transformers_logging.get_verbosity() >= logging.ERROR
    try:
        with _quiet_transformers() if silent else nullcontext():
            if tensors is None:
                model = auto_class(family).from_pretrained(source, dtype=dtype, trust_remote_code=False)
            else:
                model_class: Any = type(shapes_only(family))  # the automatic class takes no tensors
                config = copy.deepcopy(family.config)  # a dtype is noted in it
                model = model_class.from_pretrained(None, config=config, dtype=dtype, state_dict=tensors)
                model.config.name_or_path = source
                _take_generation_config(model, source)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"'{source}' cannot be loaded: {str(error).splitlines()[0]}", "Check that the download is complete."
        ) from error
    model.eval()
    return model


def _take_generation_config(model: PreTrainedModel, source: str) -> None:
    """What ends an answer, among others, where a folder says more about it than config.json."""
    from transformers import GenerationConfig

    if model.can_generate():
        with suppress(OSError):  # most folders have none
            model.generation_config = GenerationConfig.from_pretrained(source)


def _checkpoint_tensors(
    source: str, family: ModelFamily
) -> dict[str, tuple[Source, tuple[int, ...], torch.dtype]] | None:
    """Place, shape and dtype in memory of every tensor of a checkpoint; None if it is not in safetensors files."""
    files = _checkpoint_files(source)
    if files is None:
        return None
    wanted = getattr(family.config, "dtype", None)
    found = {}
    for path in files:
        for key, (name, shape) in check_safetensors(path).items():
            dtype = TORCH_DTYPES.get(name)
            if dtype is None:
                return None
            if isinstance(wanted, torch.dtype) and dtype.is_floating_point:
                dtype = wanted  # as transformers reads it
            found[key] = (Source(path, key), shape, dtype)
    return found


def _checkpoint_files(source: str) -> list[Path] | None:
    """The safetensors files that transformers would read, in its order of preference; None if there are none."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

    def find(name: str) -> Path | None:
        if Path(source).is_dir():
            path = Path(source) / name
            return path if path.is_file() else None
        return _hub_file(source, name)

    single = find(SAFE_WEIGHTS_NAME)
    if single:
        return [single]
    index = find(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return None
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    files = [find(name) for name in names]
    return None if None in files else [path for path in files if path]


def _hub_file(source: str, name: str) -> Path | None:
    """A file of a model on the hub, downloaded if it is not here yet; None if there is none.

    On a terminal the hub's own bar shows the download, elsewhere the notice is all there is.
    """
    from huggingface_hub import try_to_load_from_cache
    from transformers.utils.hub import cached_file

    if try_to_load_from_cache(source, name) is None:  # it may be there, and is not here
        warnings.warn(f"Looking for {name} of '{source}' on the hub, to download it.", QENotice, stacklevel=2)
    try:
        found = cached_file(source, name)
    except (OSError, ValueError):
        return None
    return Path(found) if found else None


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar and no report of a load that is repeated."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def auto_class(family: ModelFamily) -> Any:  # noqa: ANN401 - transformers' auto classes share no public base
    """The class of transformers whose `from_pretrained` and `from_config` make the family's models."""
    import transformers

    return getattr(transformers, family.auto_class)


def shapes_only(family: ModelFamily) -> PreTrainedModel:
    """The model on PyTorch's meta device, which has shapes and no data."""
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(family).from_config(copy.deepcopy(family.config))
    return model


def check_memory(source: str, dtype: torch.dtype | str) -> None:
    """Refuse a local model whose weights alone exceed the free memory.

    Raises:
        ResourceError: If they do.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    check_free(size * (2 if dtype == torch.float32 else 1))


def _check_memory_outside(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Refuse a model of which what is outside the blocks, with the largest block, exceeds the free memory in float32.

    Raises:
        ResourceError: If it does.
    """
    inside = {id(parameter): parameter.numel() for block in blocks for parameter in block.parameters()}
    outside = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    largest = max((sum(parameter.numel() for parameter in block.parameters()) for block in blocks), default=0)
    check_free(4 * (outside + largest))


def check_free(needed: int) -> None:
    """Refuse a model that needs more bytes than are free.

    Raises:
        ResourceError: If it does.
    """
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
