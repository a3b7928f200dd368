"""Reading recipes that come from strangers: size, aliases and numbers are checked before anything is expanded."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import yaml

from qe_edge.system.errors import RecipeError, reason, shown_name
from qe_edge.system.json_files import parse_json, read_bounded_text

MAX_BYTES = 1 << 16
MAX_DIGITS = 32
INTEGER = "tag:yaml.org,2002:int"
# by PyYAML itself, and by Python about texts that YAML's tags call numbers, dates or tables
RAISED = (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
REMEDY = "A recipe is a mapping such as 'scheme: w4a8', in a YAML or JSON file below 64 KiB."
NO_ALIASES = "Write every value out: '&' and '*' are not read, because a few of them can fill the memory."


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, of which ten lines can stand for more values than fit into memory."""

    where = "The recipe"

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call] # PyYAML has no types here
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise RecipeError(f"{self.where} has a YAML alias in line {line}.", NO_ALIASES)
        node: yaml.Node | None = super().compose_node(parent, index)
        if isinstance(node, yaml.ScalarNode) and node.tag == INTEGER and len(node.value) > MAX_DIGITS:
            raise RecipeError(f"{self.where} has a number of {len(node.value)} digits in line {line}.", REMEDY)
        if isinstance(node, yaml.MappingNode):
            keys = sorted(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            twice = [key for key, following in itertools.pairwise(keys) if key == following]
            if twice:
                raise RecipeError(f"{self.where} has the key '{shown_name(twice[0])}' twice.", "Leave one of them out.")
        return node


def parse_yaml(text: str, where: str = "The recipe") -> Any:  # noqa: ANN401 - any YAML value
    """The value that a YAML text describes.

    Args:
        text: The text.
        where: Its origin, as the beginning of a sentence.

    Raises:
        RecipeError: For a text with aliases or keys twice, one that is no YAML or is too long.

    Example:
        >>> parse_yaml("{experts: 4}")
        {'experts': 4}
    """
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{where} has {len(text)} characters, which is too long.", REMEDY)
    try:
        loader = _PlainLoader(text)
        loader.where = where
        return loader.get_single_data()
    except RAISED as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else reason(error)
        raise RecipeError(f"{where} is not valid YAML or JSON: {what}.", "Correct that line.") from error


def load_recipe(path: Path) -> dict[str, Any]:
    r"""Read a YAML or JSON recipe file to a plain dictionary; `make_recipe` validates it.

    Raises:
        RecipeError: If the file is missing, no text, too large or not a mapping.

    Example:
        >>> _ = Path("recipe.yaml").write_text("method: gptq\nscheme: w4a16\n")
        >>> load_recipe(Path("recipe.yaml"))
        {'method': 'gptq', 'scheme': 'w4a16'}
    """
    if not os.path.lexists(path):  # as Path.exists, and False for a name with NUL
        raise RecipeError(f"There is no recipe file '{path}'.", "Check the path given with --recipe.")
    text = read_bounded_text(path, error=RecipeError, remedy=REMEDY, limit=MAX_BYTES)
    if path.suffix == ".json":
        values = parse_json(text, path, RecipeError, "Correct that line.")
    else:
        values = parse_yaml(text, f"'{path}'")
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RecipeError(f"'{path}' holds no recipe.", REMEDY)
    return values
