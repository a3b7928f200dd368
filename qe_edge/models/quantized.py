"""The quantized checkpoint: safetensors, config.json with a `quantization_config`, recipe, tokenizer and processor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qe_edge.checkpoint.detection import QUANT_METHOD, is_checkpoint
from qe_edge.checkpoint.files import RECIPE, check_checkpoint, write_checkpoint_files
from qe_edge.checkpoint.layer_files import LayerGeometry, assemble_layers, layer_tensors
from qe_edge.checkpoint.safetensors_check import check_safetensors
from qe_edge.checkpoint.safetensors_write import write_tensors
from qe_edge.layers.embedding import QuantizedEmbedding
from qe_edge.layers.linear import quantized_linears
from qe_edge.models.configuration import load_config, load_family
from qe_edge.models.exactness import note_own_head
from qe_edge.models.family import ModelFamily
from qe_edge.models.generation_files import read_generation_config
from qe_edge.models.groups import set_module
from qe_edge.models.loading import LoadedModel, auto_class
from qe_edge.models.rotation import last_norm, mix_last_norm
from qe_edge.models.unset import unset_parameters
from qe_edge.numerics.schemes import Scheme
from qe_edge.system.atomic import atomic_folder
from qe_edge.system.errors import ArtifactError, shown
from qe_edge.system.json_files import read_json_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT_VERSION = 3
WEIGHTS = "model.safetensors"
RUN = "run.json"


class StoredRecipe(Protocol):
    """The part of a recipe that a checkpoint stores.

    Example:
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> recipe: StoredRecipe = make_recipe(method="gptq", scheme="w4a16")
        >>> recipe.get_scheme().weight.bits
        4
    """

    def get_scheme(self) -> Scheme:
        """Number grids of weights and activations."""
        ...

    def model_dump_json(self, *, indent: int) -> str:
        """The recipe as JSON."""
        ...


def save_quantized(
    loaded: LoadedModel, recipe: StoredRecipe, folder: Path, run: Mapping[str, object] | None = None
) -> None:
    """Write a checkpoint folder; it appears only when it is complete, and replaces an older one.

    Tensors that are not in memory are read one by one while they are written.

    Args:
        loaded: The model with its quantized layers.
        recipe: The resolved recipe.
        folder: Folder to write.
        run: Inputs that the run depended on, for `run.json`; None writes no such file.

    Raises:
        InputError: If `folder` holds files that QE-Edge did not write.
        ResourceError: If the disk is full.

    Example:
        >>> import qe_edge  # doctest: +SKIP
        >>> loaded, recipe = qe_edge.quantize("demo", qe_edge.make_recipe(method="gptq"))  # doctest: +SKIP
        >>> save_quantized(loaded, recipe, Path("checkpoint"))  # doctest: +SKIP
    """
    layers = quantized_linears(loaded.model)
    tensors, shared = layer_tensors(layers)
    prefixes = tuple(f"{name}." for name in layers)
    plain = {name: tensor for name, tensor in loaded.model.state_dict().items() if not name.startswith(prefixes)}
    tied = _tied_names(plain)
    tensors |= {name: tensor for name, tensor in plain.items() if name not in tied}
    config = json.loads(loaded.family.config.to_json_string(use_diff=True))
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "version": FORMAT_VERSION,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": _group(recipe.get_scheme(), list(layers))},
        "ignore": _ignored(loaded.model),
        "layers": {name: LayerGeometry.of(layer).stored() for name, layer in layers.items()},
        "shared": shared,
        "tied": tied,
    }
    with atomic_folder(folder) as part:
        write_tensors(tensors, part / WEIGHTS, loaded.stored.value, metadata={"format": "pt"})
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (part / RECIPE).write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")
        if run is not None:
            (part / RUN).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        if getattr(loaded.model, "generation_config", None) is not None:
            # as it is: transformers' own writer refuses what it takes for contradictory, after all the work
            text = loaded.model.generation_config.to_json_string()
            (part / "generation_config.json").write_text(text, encoding="utf-8")
        loaded.family.save_processor(loaded.processor, part)
        write_checkpoint_files(part, loaded.source, getattr(loaded.family.config, "_commit_hash", None))


def load_quantized(folder: str | Path) -> LoadedModel:
    """Load a quantized checkpoint. The result is bit-identical to the model that was saved.

    Raises:
        ArtifactError: If the folder is no checkpoint of QE-Edge, is damaged, or is of another version.

    Example:
        >>> loaded = load_quantized("checkpoint")  # doctest: +SKIP
        >>> len(quantized_linears(loaded.model))  # doctest: +SKIP
    """
    folder = Path(folder)
    section = read_section(folder)
    check_checkpoint(folder)
    header = check_safetensors(folder / WEIGHTS)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in header}
    layers = assemble_layers(section["layers"], section["shared"], header, tensors)
    family = load_family(str(folder), ArtifactError)
    model = _empty_model(str(folder), family, tensors)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, layer in layers.items():
        if name not in linears:
            raise _damaged(folder, f"the model has no linear layer '{name}'")
        if (layer.bias is None) != (linears[name].bias is None):
            raise _damaged(folder, f"the bias of '{name}' is missing or unknown")
        set_module(model, name, layer)
    prefixes = tuple(f"{name}." for name in layers)
    plain = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}
    for name, source in section["tied"].items():
        if source not in plain or name in tensors:
            raise _damaged(folder, f"'{name}' shares the missing tensor '{source}', or is one itself")
    plain |= {name: plain[source] for name, source in section["tied"].items()}
    _fill(model, plain, prefixes, folder)
    note_own_head(model, family)
    model.tie_weights()
    generation = read_generation_config(str(folder), ArtifactError)
    if generation is not None:
        model.generation_config = generation
    return LoadedModel(model.eval(), family, family.load_processor(str(folder)), str(folder))


def read_section(folder: Path) -> dict[str, Any]:
    """Read `quantization_config` of a checkpoint's config.json: version, layers, and shared tensors.

    Raises:
        ArtifactError: If the folder is no checkpoint of QE-Edge, is damaged, or is of another version.

    Example:
        >>> list(read_section(Path("checkpoint"))["layers"])[0]  # doctest: +SKIP
    """
    if not is_checkpoint(folder):
        raise ArtifactError(
            f"'{folder}' is not a quantized checkpoint.", "Give the output folder of 'qe-edge quantize'."
        )
    section: dict[str, Any] = read_json_table(folder / "config.json")["quantization_config"]
    _check_section(folder, section)
    return section


def _empty_model(folder: str, family: ModelFamily, tensors: dict[str, Tensor]) -> PreTrainedModel:
    """The model without weights, in the precision that the checkpoint stores."""
    config = load_config(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with unset_parameters():
        model: PreTrainedModel = auto_class(family).from_config(config)
    if any(name.endswith(".norm.mixing.weight") for name in tensors):
        if last_norm(model) is None:
            raise _damaged(Path(folder), "it is rotated, and the model has no last norm")
        mix_last_norm(model)
    for name in [name for name, module in model.named_modules() if module is model.get_input_embeddings()]:
        codes, scales = (tensors.get(f"{name}.{part}") for part in ("codes", "scales"))
        if codes is None or scales is None:
            continue
        if codes.dtype != torch.int8 or not scales.is_floating_point():
            raise _damaged(Path(folder), "its embedding is no INT8 codes with scales")
        set_module(model, name, QuantizedEmbedding.like(model.get_input_embeddings()))
    for name, parameter in model.named_parameters():
        if name in tensors:
            parameter.data = parameter.data.to(tensors[name].dtype)
    return model


def _fill(model: PreTrainedModel, plain: dict[str, Tensor], prefixes: tuple[str, ...], folder: Path) -> None:
    """Give a model all its tensors outside the layers with these prefixes, as they are stored.

    Raises:
        ArtifactError: If there is one too many or too few, or one of another shape.
    """
    # a buffer must own its memory: the export changes its type, which no view of the file's tensors can follow
    buffers = {name for name, _ in model.named_buffers()}
    plain = {name: tensor.clone() if name in buffers else tensor for name, tensor in plain.items()}
    try:
        missing, unexpected = model.load_state_dict(plain, strict=False, assign=True)
    except RuntimeError as error:
        raise _damaged(folder, "a tensor does not fit the configuration") from error
    missing = [name for name in missing if not name.startswith(prefixes)]
    if missing or unexpected:
        raise _damaged(folder, f"tensor '{(missing + unexpected)[0]}' is missing or unknown")


def _check_section(folder: Path, section: dict[str, Any]) -> None:
    if section.get("version") != FORMAT_VERSION:
        raise ArtifactError(
            f"'{folder}' has checkpoint version {shown(section.get('version'))}; this QE-Edge reads {FORMAT_VERSION}.",
            "Quantize again, or install the version that wrote it.",
        )
    for key in ("layers", "shared", "tied"):
        if not isinstance(section.get(key), dict):
            raise _damaged(folder, f"quantization_config.{key} is missing")
    if not all(isinstance(source, str) for key in ("shared", "tied") for source in section[key].values()):
        raise _damaged(folder, "a shared tensor names no source")
    if not (folder / WEIGHTS).is_file():
        raise _damaged(folder, f"{WEIGHTS} is missing")


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """The scheme in compressed-tensors' vocabulary."""
    weight = scheme.weight
    activations = None
    if scheme.activation_bits:
        activations = {
            "num_bits": scheme.activation_bits,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
    return {
        "targets": targets,
        "weights": {
            "num_bits": weight.bits,
            "type": "int",
            "symmetric": weight.symmetric,
            "strategy": "channel" if weight.group_size < 0 else "group",
            "group_size": None if weight.group_size < 0 else weight.group_size,
            "dynamic": False,
        },
        "input_activations": activations,
    }


def _ignored(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _tied_names(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Names whose tensor is the same memory as an earlier one."""
    owner: dict[tuple[int, torch.Size], str] = {}
    tied = {}
    for name, tensor in tensors.items():
        first = owner.setdefault((tensor.data_ptr(), tensor.shape), name)
        if first != name:
            tied[name] = first
    return tied


def _damaged(folder: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"The checkpoint '{folder}' is damaged: {reason}.", "Quantize the model again.")
