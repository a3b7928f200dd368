"""Merges the LoRA that lies in a subfolder of a model and that the model needs for pictures into its weights.

Phi-4-multimodal's base weights answer texts. For pictures transformers' documentation loads an adapter from the folder
`vision-lora` beside them. It is a LoRA of PEFT: a weight `W` becomes `W + scale * B @ A` (Hu et al. 2022, equation 3).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from qe_edge.checkpoint.known_files import ADAPTER
from qe_edge.checkpoint.safetensors_check import check_safetensors
from qe_edge.models.guard import check_values
from qe_edge.models.model_files import find_file
from qe_edge.models.origin import FLOATS, MERGE
from qe_edge.models.stored import Change, Source, read_tensors
from qe_edge.system.errors import ModelError, NumericalError, QENotice, printable
from qe_edge.system.json_files import read_json_table

if TYPE_CHECKING:
    from qe_edge.models.loading import LoadedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, DOWN, UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
UNUSED = {  # keys of PEFT that do not change what a stored adapter adds to a weight
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules"),
    *("inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config"),
    *("megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config"),
    *("target_modules", "task_type"),
}
REMEDY = f"Get the folder '{ADAPTER}' of the original model again. Or: {MERGE[0].lower()}{MERGE[1:]}"
Dtype = Mapping[str, tuple[str, tuple[int, ...]]]


class AdapterConfig(BaseModel):
    """adapter_config.json of a plain LoRA; what changes how it is applied is refused.

    Raises:
        ValueError: For such a key.
    """

    model_config = ConfigDict(extra="allow")
    peft_type: Literal["LORA"]
    r: Annotated[int, Field(strict=True, ge=1, le=2**14)]
    lora_alpha: Annotated[float, Field(gt=0, le=2**20, allow_inf_nan=False)]
    use_rslora: Annotated[bool, Field(strict=True)] = False
    bias: Literal["none"] = "none"
    init_lora_weights: Literal["gaussian"] | bool = True

    @model_validator(mode="after")
    def _plain(self) -> AdapterConfig:
        changing = [key for key, value in (self.model_extra or {}).items() if value and key not in UNUSED]
        if changing:
            raise ValueError(f"'{printable(changing[0])[:60]}' is set, and QE-Edge merges a plain LoRA alone")
        return self

    @property
    def scale(self) -> float:
        """Factor on `B @ A`."""
        return self.lora_alpha / (sqrt(self.r) if self.use_rslora else self.r)


def merge_vision_adapter(loaded: LoadedModel) -> LoadedModel:
    """Merge the adapter of a model's folder into its weights, where the family has one; each when it is needed.

    A sum is computed in float32 and has the weight's own type, as PEFT's `merge_and_unload` does it.

    Args:
        loaded: The model, whose weights may be in their files. It is changed.

    Returns:
        The same model.

    Raises:
        ModelError: If the adapter is no plain LoRA of safetensors, or does not fit the model.
        ArtifactError: If its file is damaged.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> loaded = load_model("demo")
        >>> merge_vision_adapter(loaded) is loaded  # of a family without such an adapter: nothing happens
        True
    """
    if not loaded.family.has_vision_adapter:
        return loaded
    path, weights = (find_file(loaded.source, f"{ADAPTER}/{name}") for name in (CONFIG, WEIGHTS))
    if path is None and weights is None and not (Path(loaded.source) / ADAPTER).exists():
        warnings.warn(
            f"'{loaded.source}' has no folder '{ADAPTER}', whose adapter this model needs for pictures. If it is not "
            "merged into the weights already, copy it there.",
            QENotice,
            stacklevel=2,
        )
        return loaded
    if path is None or weights is None:
        missing = CONFIG if path is None else WEIGHTS
        raise ModelError(f"The folder '{ADAPTER}' of '{loaded.source}' has no {missing}.", REMEDY)
    table = read_json_table(path, error=ModelError, remedy=REMEDY)
    config = check_values(AdapterConfig, table, path, REMEDY, ModelError)
    linears = {
        f"{block.name}.{name}": module
        for block in loaded.family.blocks(loaded.model)
        for name, module in block.module.named_modules()
        if isinstance(module, nn.Linear)
    }
    for name in _adapted(weights, config, linears):
        key = f"{name}.weight"
        loaded.stored.change(key, linears[name].weight, _merging(weights, name, config.scale))
    warnings.warn(
        f"The adapter '{ADAPTER}' of '{loaded.source}' is merged into the language model, which answers texts with it "
        "too.",
        QENotice,
        stacklevel=2,
    )
    return loaded


def _adapted(path: Path, config: AdapterConfig, linears: Mapping[str, Any]) -> list[str]:
    """Names of the layers that the adapter changes.

    Raises:
        ModelError: Naming a tensor that is none of a LoRA of the model.
    """
    header: Dtype = check_safetensors(path)
    names = sorted({tensor.removesuffix(DOWN).removesuffix(UP).removeprefix(PREFIX) for tensor in header})
    wanted: dict[str, tuple[int, ...]] = {}
    for name in names:
        if name in linears:
            rows, columns = linears[name].weight.shape
            wanted |= {f"{PREFIX}{name}{DOWN}": (config.r, columns), f"{PREFIX}{name}{UP}": (rows, config.r)}
    for tensor, (dtype, shape) in header.items():
        if wanted.get(tensor) != shape or dtype not in FLOATS:
            raise ModelError(
                f"Tensor '{printable(tensor)[:200]}' of '{path}', {dtype} of shape {list(shape)}, is none of a LoRA of "
                f"rank {config.r} of this model.",
                REMEDY,
            )
    missing = sorted(wanted.keys() - header.keys())
    if missing or not names:
        raise ModelError(f"'{path}' has no tensor '{missing[0] if missing else DOWN[1:]}'.", REMEDY)
    return names


def _merging(path: Path, name: str, scale: float) -> Change:
    """What makes the merged weight of a layer's own; it reads the two factors when it is called."""

    def merged(weight: Tensor) -> Tensor:
        keys = {part: Source(path, f"{PREFIX}{name}{part}") for part in (DOWN, UP)}
        factors = {part: tensor.to(weight.device, torch.float32) for part, tensor in read_tensors(keys).items()}
        total = torch.addmm(weight.float(), factors[UP], factors[DOWN], alpha=scale).to(weight.dtype)
        if not bool(total.isfinite().all()):
            raise NumericalError(f"The adapter of '{name}' in '{path}' makes NaN or infinity.", REMEDY)
        return total

    return merged
