"""docs/methods.md names every method with its options and presets, and nothing that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qe_edge.methods import METHODS
from qe_edge.methods.static import StaticOptions

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
ROWS = {
    match.group(1): match.group(0)
    for match in re.finditer(r"^\| `(\w+)` \|.*$", PAGE.read_text(encoding="utf-8"), re.M)
}


def test_the_table_is_the_registry() -> None:
    assert list(ROWS) == list(METHODS)


@pytest.mark.parametrize("method", list(METHODS))
def test_options_and_presets_are_the_methods_own(method: str) -> None:
    kind = METHODS[method]
    cell = ROWS[method].rstrip("|").rpartition("|")[2]
    named = set(re.findall(r"`(\w+)`", cell))
    options = set(kind.Options.model_fields)
    if "as `lorc`" in cell:
        named = (named - {"lorc"}) | set(StaticOptions.model_fields)
    assert named == options | (set(kind.presets) - {"default"})
    assert f"**`{method}`**" in PAGE.read_text(encoding="utf-8")
