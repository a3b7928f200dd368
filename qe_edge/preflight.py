"""What is checked of a model before any long work, and how a stopped run knows it again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from qe_edge.errors import NumericalError, RecipeError
from qe_edge.models.family import Block
from qe_edge.models.loading import LoadedModel

CHUNK = 1 << 22  # numbers that are looked at together, so that a large embedding is not in memory twice


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


def check_weights(loaded: LoadedModel) -> None:
    """Refuse NaN and infinity before any long work, in every tensor of the model.

    A tensor that is not in memory is read, looked at and forgotten.

    Raises:
        NumericalError: Naming the first tensor that holds one.
    """
    for name, tensor in loaded.model.state_dict().items():
        values = loaded.stored.value(name, tensor).reshape(-1)
        if not all(bool(torch.isfinite(part).all()) for part in torch.split(values, CHUNK)):
            raise NumericalError(
                f"The weights '{name}' hold NaN or infinity.",
                "The checkpoint is damaged or diverged in training; get a sound one.",
            )


def model_fingerprint(loaded: LoadedModel) -> str:
    """Hash of the model's configuration and of every tensor's shape and first values."""
    digest = hashlib.sha256(loaded.family.config.to_json_string(use_diff=False).encode())
    for name, tensor in loaded.model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(loaded.stored.value(name, tensor).reshape(-1)[:64].float().numpy().tobytes())
    return digest.hexdigest()
