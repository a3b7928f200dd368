"""The recipe of a command line: a file, if there is one, and the options over it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qe_edge.recipes.files import load_recipe, parse_yaml
from qe_edge.recipes.recipe import Recipe, make_recipe
from qe_edge.system.errors import QENotice, RecipeError


def read_recipe(
    *,
    recipe_file: Path | None = None,
    settings: Sequence[str] = (),
    modules: str | None = None,
    calibration: str | None = None,
    samples: int | None = None,
    bits: float | None = None,
    read_bits: float | None = None,
    **values: object,
) -> Recipe:
    """Merge the file with the options and validate the result.

    Args:
        recipe_file: YAML or JSON.
        settings: Method options, each `KEY=VALUE`.
        modules: Names with commas between them.
        calibration: Source of the calibration samples.
        samples: How many of them.
        bits: Budget of stored bits per weight.
        read_bits: Budget of bits per weight that a decoded token reads.
        values: The other keys of a recipe (method, scheme, preset, seed); None where the user gave none.

    Raises:
        RecipeError: For a file or a value that cannot be used.
        UnknownNameError: For a key or name that does not exist; the nearest valid one is named.
    """
    merged = load_recipe(recipe_file) if recipe_file else {}
    if values.get("preset") is not None and merged.pop("options", None):
        warnings.warn(
            f"--preset {values['preset']} takes the place of the options in '{recipe_file}'.", QENotice, stacklevel=2
        )
    merged.update({key: value for key, value in values.items() if value is not None})
    if modules is not None:
        merged["modules"] = [name.strip() for name in modules.split(",") if name.strip()]
    limits = {"bits": bits, "read_bits": read_bits}
    _merge(merged, "budget", {key: value for key, value in limits.items() if value is not None})
    drawn = {"source": calibration, "samples": samples}
    _merge(merged, "calibration", {key: value for key, value in drawn.items() if value is not None})
    _merge(merged, "options", dict(_setting(text) for text in settings))
    return make_recipe(**merged)


def _merge(merged: dict[str, Any], key: str, values: dict[str, object]) -> None:
    """Put `values` over the mapping `key` of the file; anything else there is left for validation to refuse."""
    if values and isinstance(merged.setdefault(key, {}), dict):
        merged[key] = {**merged[key], **values}


def _setting(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"'--set {text[:60]}' has no value.", "Write --set KEY=VALUE, for example --set experts=4.")
    try:
        return key.strip(), parse_yaml(value)
    except RecipeError as error:
        raise RecipeError(
            f"The value of '--set {text[:60]}' cannot be read.", "Write a number, true, false or a word."
        ) from error
