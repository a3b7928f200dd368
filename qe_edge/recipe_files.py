"""Reading recipes that come from strangers: size, aliases and types are checked before anything is expanded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qe_edge.errors import RecipeError
from qe_edge.json_files import parse_json, read_bounded_text

MAX_BYTES = 1 << 16
REMEDY = "A recipe is a mapping such as 'scheme: w4a8', in a YAML or JSON file below 64 KiB."
NO_ALIASES = "Write every value out: '&', '*' and '<<' are not read, because a few of them can fill the memory."


class _PlainLoader(yaml.SafeLoader):
    """YAML without anchors and aliases: ten lines of them can stand for more values than fit into memory."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise RecipeError(f"The recipe has a YAML alias in line {event.start_mark.line + 1}.", NO_ALIASES)
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


def parse_yaml(text: str) -> Any:  # noqa: ANN401 - any YAML value
    """The value that a YAML text describes.

    Raises:
        RecipeError: For a text with aliases, one that is no YAML or is too long.
    """
    if len(text) > MAX_BYTES:
        raise RecipeError(f"A text of {len(text)} characters is too long for a recipe.", REMEDY)
    try:
        return yaml.load(text, Loader=_PlainLoader)  # noqa: S506 - a SafeLoader
    except (
        yaml.YAMLError,
        ValueError,
        ArithmeticError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise RecipeError(f"This is not valid YAML: {reason}.", "Correct that line.") from error


def load_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON recipe file to a plain dictionary; `make_recipe` validates it.

    Raises:
        RecipeError: If the file is missing, no text, too large or not a mapping.
    """
    if not path.exists():
        raise RecipeError(f"There is no recipe file '{path}'.", "Check the path given with --recipe.")
    text = read_bounded_text(path, error=RecipeError, remedy=REMEDY, limit=MAX_BYTES)
    if path.suffix == ".json":
        values = parse_json(text, path, RecipeError, "Correct that line.")
    else:
        try:
            values = parse_yaml(text)
        except RecipeError as error:
            raise RecipeError(f"'{path}' is no recipe. {error.problem}", error.remedy) from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RecipeError(f"'{path}' holds no recipe.", REMEDY)
    return values
