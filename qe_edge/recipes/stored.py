"""The recipe that a checkpoint was made with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qe_edge.checkpoint.files import RECIPE, check_checkpoint
from qe_edge.recipes.recipe import Recipe, make_recipe
from qe_edge.system.errors import ArtifactError


def load_checkpoint_recipe(folder: Path) -> Recipe:
    """The resolved recipe that a checkpoint was made with.

    Raises:
        ArtifactError: If it is missing, damaged or changed.

    Example:
        >>> load_checkpoint_recipe(Path("out/demo/checkpoint")).method  # doctest: +SKIP
    """
    check_checkpoint(folder, RECIPE)
    try:
        values: dict[str, Any] = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"The checkpoint '{folder}' is damaged: {RECIPE} cannot be read.", "Quantize the model again."
        ) from error
    return make_recipe(**values)
