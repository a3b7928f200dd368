"""Checks of a model before any long work."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from qe_edge.layers.magnitudes import check_weight
from qe_edge.methods import Method
from qe_edge.models.family import Block, ModelFamily, Sample
from qe_edge.models.groups import linear_groups
from qe_edge.models.loading import LoadedModel
from qe_edge.numerics.grids import PER_CHANNEL, WeightGrid
from qe_edge.recipes.recipe import Recipe
from qe_edge.system.errors import CommonNotice, NumericalError, QENotice, RecipeError

CLOCK = "strftime_now"  # the function that transformers gives to chat templates
CHUNK = 1 << 22  # numbers that are looked at together, so that a large embedding is not in memory twice


def check_modules(blocks: Sequence[Block], modules: Sequence[str]) -> None:
    """Refuse modules that a model with these blocks does not have.

    Raises:
        RecipeError: Naming the modules that it has.

    Example:
        >>> blocks = [Block("layers.0", torch.nn.Linear(4, 4), group="language")]
        >>> check_modules(blocks, ["language"])
        >>> check_modules(blocks, ["visual"])
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.RecipeError: The model has no visual module. Choose among those that it has:
        --modules language.
    """
    present = list(dict.fromkeys(block.group for block in blocks))
    missing = sorted(set(modules) - set(present))
    if missing:
        raise RecipeError(
            f"The model has no {missing[0]} module.", f"Choose among those that it has: --modules {','.join(present)}."
        )


def check_predictions(family: ModelFamily, recipe: Recipe) -> None:
    """Refuse what rests on a text model's predictions or its head, of a model that makes actions.

    Raises:
        RecipeError: Naming it.

    Example:
        >>> from qe_edge.demo import model_path
        >>> from qe_edge.models.configuration import load_family
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> check_predictions(load_family(str(model_path())), make_recipe(budget={"bits": 4.25}))  # it writes text
    """
    if not family.acts:
        return
    method = recipe.build_method()
    named = f"The method '{recipe.method}' as it is set"
    whole = method.needs_gradients or method.weighs_tokens or method.trains_model
    for used, what, remedy in (
        (bool(recipe.budget), "A budget", "Leave --bits and --read-bits out: the method's options give the size."),
        (recipe.head != "none", "The option --head", "Leave it out."),
        (whole or method.sees_both_models or recipe.rotates, named, "Choose a method such as qe, gptq, awq or rtn."),
    ):
        if used:
            raise RecipeError(f"{what} needs a model that writes text, and a '{family.model_type}' model acts.", remedy)


def check_shapes(blocks: Sequence[Block], method: Method[Any]) -> None:
    """Refuse linear layers of shapes that a method cannot take.

    Args:
        blocks: Blocks whose linear layers are going to be quantized.
        method: The method.

    Raises:
        RecipeError: Naming the first layer.

    Example:
        >>> from qe_edge.methods import METHODS
        >>> blocks = [Block("layers.0", torch.nn.ModuleDict({"up": torch.nn.Linear(4096, 4)}), group="language")]
        >>> method = METHODS["obq"](METHODS["obq"].Options())
        >>> check_shapes(blocks, method)
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.RecipeError: 'layers.0.up' [4, 4096] is too large for OBQ, which takes at most 2048
        inputs and 1048576 weights. Choose method gptq, which rounds all outputs in one order.
    """
    for block in blocks:
        for group in linear_groups(block, ()):
            for name, linear in zip(group.names, group.linears, strict=True):
                method.check_shape(name, linear.out_features, linear.in_features)


def note_torch_only(recipe: Recipe) -> None:
    """Say that the result of a method runs in PyTorch alone.

    Example:
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> with warnings.catch_warnings(record=True) as notices:
        ...     note_torch_only(make_recipe(method="quip"))
        >>> print(str(notices[0].message).partition(",")[0])
        The result of the method 'quip' runs in PyTorch alone
    """
    reason = recipe.build_method().torch_only
    if reason:
        warnings.warn(
            QENotice(
                f"The result of the method '{recipe.method}' runs in PyTorch alone, and 'qe-edge export' refuses it: "
                f"{reason} have no place in the operator."
            ),
            stacklevel=2,
        )


def note_calibration(loaded: LoadedModel, blocks: Sequence[Block], samples: Sequence[Sample]) -> None:
    """Give a notice if the calibration data lack pictures for a model that sees, or prompts change with the date.

    Args:
        loaded: The model.
        blocks: All its blocks.
        samples: The calibration samples.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> loaded = load_model("demo")
        >>> with warnings.catch_warnings(record=True) as notices:
        ...     note_calibration(loaded, loaded.family.blocks(loaded.model), [Sample(None, "Is it red?", "no")])
        >>> print(str(notices[0].message).partition(",")[0])
        No calibration sample has a picture
    """
    if any(block.group == "visual" for block in blocks) and not any(sample.media for sample in samples):
        warnings.warn(
            "No calibration sample has a picture, and the model sees: its answers about pictures may suffer. Calibrate "
            "with pictures, or compare with 'qe-edge validate'.",
            QENotice,
            stacklevel=2,
        )
    template = getattr(getattr(loaded.processor, "tokenizer", None), "chat_template", None)
    if CLOCK in str(template):
        warnings.warn(
            "The chat template writes the date into prompts, so calibration and answers depend on the day.",
            QENotice,
            stacklevel=2,
        )


def note_groups(blocks: Sequence[Block], grids: Iterable[WeightGrid]) -> None:
    """Give a notice that names linear layers with other groups than a grid asks for: their width is no multiple.

    Args:
        blocks: Blocks whose linear layers are going to be quantized.
        grids: Number grids that their weights may get.

    Example:
        >>> blocks = [Block("layers.0", torch.nn.ModuleDict({"up": torch.nn.Linear(96, 4)}), group="language")]
        >>> with warnings.catch_warnings(record=True) as notices:
        ...     note_groups(blocks, [WeightGrid(4, group_size=64)])
        >>> print(notices[0].message)
        Inputs of width 96 are no multiple of groups of 64; layers.*.up get groups of 32.
    """
    widths: dict[int, set[str]] = defaultdict(set)
    for block in blocks:
        for group in linear_groups(block, ()):
            names = {re.sub(r"\.\d+\.", ".*.", name) for name in group.names}
            widths[group.linears[0].in_features] |= names
    for size in dict.fromkeys(grid.group_size for grid in grids if grid.group_size != PER_CHANNEL):
        for width, names in sorted(widths.items()):
            found = WeightGrid(4, size).resolve_group(width)
            if found == min(size, width):
                continue
            instead = "one scale per output channel" if found == PER_CHANNEL else f"groups of {found}"
            warnings.warn(
                f"Inputs of width {width} are no multiple of groups of {size}; {', '.join(sorted(names))} get "
                f"{instead}.",
                CommonNotice,
                stacklevel=2,
            )


def check_weights(loaded: LoadedModel, blocks: Sequence[Block], grid: WeightGrid) -> None:
    """Refuse NaN and infinity in any tensor of the model, and linear layers that the grid cannot hold.

    This comes before any long work. A tensor that is not in memory is read, looked at and forgotten.

    Args:
        loaded: The model.
        blocks: Blocks whose linear layers are going to be quantized.
        grid: Number grid of their weights.

    Raises:
        NumericalError: Naming the first tensor.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> loaded = load_model("demo")
        >>> loaded.model.lm_head.weight.data[0, 0] = float("nan")
        >>> check_weights(loaded, loaded.family.blocks(loaded.model), WeightGrid(4))
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.NumericalError: The weights 'model.language_model.embed_tokens.weight' hold NaN or
        infinity. The checkpoint is damaged or diverged in training; get a sound one.
    """
    groups = [group for block in blocks for group in linear_groups(block, ())]
    linears = {f"{name}.weight" for group in groups for name in group.names}
    for name, tensor in loaded.model.state_dict().items():
        # held by no name here: with an embedding and a head in turn, the next one would be read beside it
        _check_tensor(name, loaded.stored.value(name, tensor), grid if name in linears else None)


def _check_tensor(name: str, value: Tensor, grid: WeightGrid | None) -> None:
    """Refuse what a grid cannot hold; without a grid, NaN and infinity."""
    if grid is not None:
        check_weight(name, value, grid)
    elif not all(bool(torch.isfinite(part).all()) for part in torch.split(value.reshape(-1), CHUNK)):
        raise NumericalError(
            f"The weights '{name}' hold NaN or infinity.",
            "The checkpoint is damaged or diverged in training; get a sound one.",
        )
