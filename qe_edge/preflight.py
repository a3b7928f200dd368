"""What is checked of a model before any long work, and how a stopped run knows it again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from qe_edge.errors import NumericalError, RecipeError
from qe_edge.grids import WeightGrid
from qe_edge.groups import linear_groups
from qe_edge.magnitudes import check_weight
from qe_edge.models.family import Block
from qe_edge.models.loading import LoadedModel


def check_modules(blocks: Sequence[Block], modules: Sequence[str]) -> None:
    """Refuse modules that a model with these blocks does not have.

    Raises:
        RecipeError: Naming those that it has.
    """
    present = list(dict.fromkeys(block.group for block in blocks))
    missing = sorted(set(modules) - set(present))
    if missing:
        raise RecipeError(
            f"The model has no {missing[0]} module.", f"Choose among those that it has: --modules {','.join(present)}."
        )


def check_weights(loaded: LoadedModel, blocks: Sequence[Block], grid: WeightGrid) -> None:
    """Refuse NaN and infinity, and linear layers that the grid cannot hold, before any long work.

    Raises:
        NumericalError: Naming the first layer.
    """
    for block in blocks:
        linears = {f"{name}.weight" for group in linear_groups(block, ()) for name in group.names}
        for name, parameter in block.module.named_parameters():
            full = f"{block.name}.{name}"
            value = loaded.stored.value(full, parameter)
            if full in linears:
                check_weight(full, value, grid)
            elif not bool(torch.isfinite(value).all()):
                raise NumericalError(
                    f"The weights '{full}' hold NaN or infinity.",
                    "The checkpoint is damaged or diverged in training; get a sound one.",
                )


def model_fingerprint(loaded: LoadedModel) -> str:
    """Hash of the model's configuration and of every tensor's shape and first values."""
    digest = hashlib.sha256(loaded.family.config.to_json_string(use_diff=False).encode())
    for name, tensor in loaded.model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(loaded.stored.value(name, tensor).reshape(-1)[:64].float().numpy().tobytes())
    return digest.hexdigest()
