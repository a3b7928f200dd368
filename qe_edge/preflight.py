"""What is checked of a model before any long work."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qe_edge.errors import NumericalError, RecipeError
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


def check_weights(loaded: LoadedModel, blocks: Sequence[Block]) -> None:
    """Refuse NaN and infinity before any long work.

    Raises:
        NumericalError: Naming the first layer that holds one.
    """
    for block in blocks:
        for name, parameter in block.module.named_parameters():
            full = f"{block.name}.{name}"
            if not bool(torch.isfinite(loaded.stored.value(full, parameter)).all()):
                raise NumericalError(
                    f"The weights '{full}' hold NaN or infinity.",
                    "The checkpoint is damaged or diverged in training; get a sound one.",
                )
