"""Finding and loading a model: demo name, local folder or hub id; everything is checked before weights are read."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers.utils import logging as transformers_logging

from qe_edge.checkpoint.dtypes import torch_dtypes
from qe_edge.demo import model_path
from qe_edge.models.configuration import CONFIG, REMEDY, load_family, read_config_values
from qe_edge.models.exactness import COMPUTED, check_all_used, check_amount, check_loading, note_own_head
from qe_edge.models.family import ModelFamily
from qe_edge.models.free_memory import check_memory, check_memory_outside
from qe_edge.models.generation_files import read_generation_config
from qe_edge.models.guard import Guard
from qe_edge.models.origin import check_adapter, check_configuration, check_quantizer_files
from qe_edge.models.stored import Source, StoredWeights, placeholder, read_tensors, same_tensor
from qe_edge.models.tables import tables_of
from qe_edge.models.vision_adapter import merge_vision_adapter
from qe_edge.models.weight_files import check_links, folder_weights, weight_headers
from qe_edge.system.errors import CommonNotice, ModelError, QENotice
from qe_edge.system.json_files import read_json_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEMO = "demo"


class Stored(NamedTuple):
    """A tensor of the files: its place, its shape, its dtype in memory and in its file."""

    place: Source
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored_dtype: torch.dtype


@dataclass
class LoadedModel:
    """A model in memory.

    Attributes:
        model: transformers' own class, in evaluation mode.
        family: Its family.
        processor: Tokenizer and image processor, as `family.load_processor` returns them.
        source: Folder or hub id that it came from; tokenizer and processor files are copied from there.
        stored: Weights that stay on disk until they are needed; none for a model that was loaded as a whole.
    """

    model: PreTrainedModel
    family: ModelFamily
    processor: Any
    source: str
    stored: StoredWeights = field(default_factory=StoredWeights)

    def __post_init__(self) -> None:
        self.family.adapt(self.model)


def resolve_model(reference: str) -> str:
    """Return the folder or hub id of a model reference. The files of a folder are checked.

    Raises:
        ModelError: If the folder or its files are missing, or do not belong to an unquantized model.
        ArtifactError: If a safetensors file is damaged.

    Example:
        >>> resolve_model("HuggingFaceTB/SmolVLM2-256M-Video-Instruct")  # the id of a model on the hub
        'HuggingFaceTB/SmolVLM2-256M-Video-Instruct'
        >>> resolve_model("./no-such-folder")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ModelError: There is no model folder './no-such-folder'. Give a folder with
        config.json, a hub id 'owner/name', or 'demo'.
    """
    if reference == DEMO:
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


def load_model(reference: str, dtype: torch.dtype | str = "auto") -> LoadedModel:
    """Load a model exactly, with transformers' own classes; remote code is never run.

    Args:
        reference: "demo", a folder or a hub id.
        dtype: Precision in memory; "auto" keeps the checkpoint's.

    Raises:
        ModelError: If the model cannot be loaded, or not every tensor is found and used.
        ResourceError: If it does not fit into memory.

    Example:
        >>> loaded = load_model("demo")
        >>> type(loaded.model).__name__, loaded.family.model_type
        ('Qwen2VLForConditionalGeneration', 'qwen2_vl')
    """
    source = resolve_model(reference)
    family = load_family(source)
    check_memory(source, dtype)
    sources = check_exact(source, family)
    if dtype == "auto":
        _note_narrowed(source, sources)
    return _load_whole(source, family, dtype)


def check_exact(source: str, family: ModelFamily) -> dict[str, Stored]:
    """Refuse a model whose files do not hold exactly its tensors. The weights are not read.

    Args:
        source: Folder or hub id.
        family: The model's family.

    Returns:
        Place, shape and dtype in memory of every tensor by its name in the files.

    Raises:
        ModelError: Naming a tensor that is missing, not used, or of another shape.
        ArtifactError: If a file is damaged.

    Example:
        >>> source = resolve_model("demo")
        >>> tensors = check_exact(source, load_family(source))
        >>> tensors["model.norm.weight"].shape  # by its name in the file
        (256,)
    """
    sources, _, _ = _load_placeholders(source, family)
    return sources


def load_outside_blocks(reference: str) -> LoadedModel:
    """Load a model exactly, without the weights of its blocks, its embedding and its head.

    They are read from their files when they are needed.

    If transformers changes the tensors of a checkpoint, beyond renaming them, the whole model is loaded.

    Args:
        reference: "demo", a folder or a hub id.

    Raises:
        ModelError: If the model cannot be loaded, or not every tensor is found and used.
        ResourceError: If what has to be in memory does not fit.

    Example:
        >>> loaded = load_outside_blocks("demo")
        >>> block = loaded.family.blocks(loaded.model)[0]
        >>> loaded.stored.is_absent(next(block.module.parameters()))  # still in its file
        True
    """
    source = resolve_model(reference)
    family = load_family(source)
    sources, given, model = _load_placeholders(source, family)
    _note_narrowed(source, sources)
    key_at = {tensor.data_ptr(): key for key, tensor in given.items()}
    blocks = family.blocks(model)
    streamed = {block.name: block.module for block in blocks} | tables_of(model)
    inside = {
        f"{path}.{name}": key_at.get(tensor.data_ptr())
        for path, module in streamed.items()
        for name, tensor in module.state_dict().items()
    }
    if None in inside.values():
        changed = next(name for name, key in inside.items() if key is None)
        del model, blocks
        warnings.warn(
            f"All of '{reference}' is in memory at once, since its files do not hold '{changed}' as transformers has "
            "it.",
            QENotice,
            stacklevel=2,
        )
        check_memory(source, "auto")
        return _load_whole(source, family, "auto")
    check_memory_outside(model, list(streamed.values()))
    keys = {name: key for name, key in inside.items() if key is not None}
    if _ties(family.config):
        _share_equal_head(tables_of(model), keys, sources, given)
    del model, blocks, streamed
    later = set(keys.values())
    outside = read_tensors({key: stored.place for key, stored in sources.items() if key not in later})
    model = _from_pretrained(source, family, "auto", {key: outside.pop(key, given[key]) for key in given})
    note_own_head(model, family)
    stored = StoredWeights(
        {name: sources[key].place for name, key in keys.items()}, {name: given[key] for name, key in keys.items()}
    )
    return merge_vision_adapter(LoadedModel(model, family, family.load_processor(source), source, stored))


def _ties(config: Any) -> bool:  # noqa: ANN401 - transformers' configuration classes
    return any(getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config()))


def _share_equal_head(
    tables: Mapping[str, nn.Module],
    keys: dict[str, str],
    sources: Mapping[str, Stored],
    given: dict[str, torch.Tensor],
) -> None:
    """Let a head be its embedding where the files hold the same numbers twice.

    transformers ties the two if config.json says so and they are equal, and placeholders never are.
    """
    names = [f"{name}.weight" for name in tables]
    for embedding, head in zip(names[:-1], names[-1:], strict=False):
        one, other = sources[keys[embedding]], sources[keys[head]]
        if one != other and one.shape == other.shape and same_tensor(one.place, other.place):
            del given[keys[head]]
            keys[head] = keys[embedding]
            return


def _load_placeholders(
    source: str, family: ModelFamily
) -> tuple[dict[str, Stored], dict[str, torch.Tensor], PreTrainedModel]:
    """Return the tensors in the files, a placeholder for each, and the model made of the placeholders.

    Only transformers knows which tensor of the files becomes which tensor of the model, so it loads the placeholders.
    """
    check_configuration(family.config.to_dict(), source)
    sources = _checkpoint_tensors(source, family)
    check_amount(source, shapes_only(family), sum(prod(stored.shape) for stored in sources.values()))
    given = {key: placeholder(stored.shape, stored.dtype) for key, stored in sources.items()}
    with _quiet_transformers():
        model = _from_pretrained(source, family, "auto", dict(given))
    check_all_used(source, model, given)
    return sources, given, model


def _load_whole(source: str, family: ModelFamily, dtype: torch.dtype | str) -> LoadedModel:
    model = _from_pretrained(source, family, dtype)
    note_own_head(model, family)
    return merge_vision_adapter(LoadedModel(model, family, family.load_processor(source), source))


def _from_pretrained(
    source: str, family: ModelFamily, dtype: torch.dtype | str, tensors: dict[str, torch.Tensor] | None = None
) -> PreTrainedModel:
    """The model in evaluation mode, exactly from its files or from `tensors` in their stead."""
    model: PreTrainedModel
    exactly: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that they are told
    silent = transformers_logging.get_verbosity() >= logging.ERROR
    quiet = _quiet_transformers() if silent else nullcontext()
    with Guard(f"'{source}' cannot be loaded", "Check that the download is complete."), quiet:
        if tensors is None:
            model, info = auto_class(family).from_pretrained(
                source, dtype=dtype, trust_remote_code=False, use_safetensors=True, **exactly
            )
        else:
            model_class: Any = type(shapes_only(family))  # the automatic class takes no tensors
            config = copy.deepcopy(family.config)  # a dtype is noted in it
            model, info = model_class.from_pretrained(None, config=config, dtype=dtype, state_dict=tensors, **exactly)
            model.config.name_or_path = source
    check_loading(source, model, info)
    _take_generation_config(model, source)
    model.eval()
    return model


def _take_generation_config(model: PreTrainedModel, source: str) -> None:
    """What ends an answer, among others, where a model says more about it than config.json.

    transformers goes on without a file that is broken; here that is an error.
    """
    found = read_generation_config(source) if model.can_generate() else None
    if found is not None:
        model.generation_config = found


def _checkpoint_tensors(source: str, family: ModelFamily) -> dict[str, Stored]:
    """Place, shape and dtype in memory of every tensor of a checkpoint."""
    wanted = getattr(family.config, "dtype", None)
    found = {}
    for path, header in weight_headers(source).items():
        for key, (name, shape) in header.items():
            dtype = torch_dtypes()[name]
            read = wanted if isinstance(wanted, torch.dtype) and dtype.is_floating_point else dtype  # as transformers
            found[key] = Stored(Source(path, key), shape, read, dtype)
    return found


def _note_narrowed(source: str, sources: Mapping[str, Stored]) -> None:
    """Warn that weights lose digits because config.json names a narrower type than their files have."""
    narrowed = {
        (stored.stored_dtype, stored.dtype)
        for name, stored in sources.items()
        if not name.endswith(COMPUTED) and stored.stored_dtype.itemsize > stored.dtype.itemsize
    }
    for before, after in sorted(narrowed, key=str):
        names = [str(dtype).removeprefix("torch.") for dtype in (before, after)]
        warnings.warn(
            f"The files of '{source}' hold {names[0]} weights, which are read as {names[1]}, as config.json says.",
            CommonNotice,
            stacklevel=2,
        )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar and no report of a load that is repeated."""
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
    """Return the class of transformers whose `from_pretrained` and `from_config` make the family's models.

    Example:
        >>> auto_class(load_family(resolve_model("demo"))).__name__
        'AutoModelForImageTextToText'
    """
    return getattr(transformers, family.auto_class)


def shapes_only(family: ModelFamily) -> PreTrainedModel:
    """Build the model on PyTorch's meta device, which has shapes and no data.

    Example:
        >>> model = shapes_only(load_family(resolve_model("demo")))
        >>> sum(parameter.numel() for parameter in model.parameters()) > 5_000_000, model.device.type
        (True, 'meta')
    """
    with Guard("config.json describes no model that can be built", REMEDY), torch.device("meta"):
        model: PreTrainedModel = auto_class(family).from_config(copy.deepcopy(family.config))
    return model


def _check_folder(folder: Path) -> None:
    """Everything that can be said of a model's folder without loading a weight."""
    check_adapter(folder)
    config = folder / CONFIG
    if not config.exists() and not config.is_symlink():
        raise ModelError(f"'{folder}' has no config.json.", "Give the folder of a downloaded transformers model.")
    check_links(folder)
    check_configuration(read_json_table(config, error=ModelError, remedy=REMEDY), str(folder))
    read_config_values(str(folder))
    check_quantizer_files(folder)
    folder_weights(folder)
