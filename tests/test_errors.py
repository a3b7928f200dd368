"""What a stranger wrote stays short and printable in a message, however long or odd it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qe_edge.cli.recipes import read_recipe
from qe_edge.quantization.run_record import changes, in_one_line
from qe_edge.runtime.manifest import read_manifest
from qe_edge.system.errors import QEError, UnknownNameError, reason, shown, shown_name

LONG = "a\0\x1b[31m\ud800" * 2000
WIDE: list[Any] = [[[[["x" * 1000] * 50] * 50] * 50] * 50] * 50
ODD = [LONG, WIDE, {LONG: WIDE}, 10**400, float("nan"), LONG.encode("utf-8", "surrogatepass"), {1: {2: {3: {4: 5}}}}]


@pytest.mark.parametrize("value", ODD, ids=lambda value: type(value).__name__)
def test_a_strangers_value_is_short_and_printable(value: object) -> None:
    for text in (shown(value), shown_name(value)):
        assert text.isprintable()
        assert len(text) <= 83


@pytest.mark.parametrize(
    "error", [ValueError(LONG), KeyError(LONG), OSError(2, LONG, LONG)], ids=lambda error: type(error).__name__
)
def test_what_a_library_says_is_short_and_printable(error: Exception) -> None:
    assert reason(error).isprintable()
    assert len(reason(error)) <= 303


def test_values_that_are_ordinary_are_whole() -> None:
    assert shown("w4a8") == "'w4a8'"
    assert shown({"samples": 4, "source": "demo"}) == "{'samples': 4, 'source': 'demo'}"
    assert shown_name("options.tokens") == "options.tokens"


def short(error: QEError) -> bool:
    words = f"{error.problem} {error.remedy}"
    return words.isprintable() and len(words) < 1200  # a recipe has many keys, which are all named


@pytest.mark.parametrize(
    "values",
    [
        {LONG: 1}, {"scheme": LONG}, {"method": LONG}, {"preset": LONG}, {"modules": [LONG]}, {"options": {LONG: 1}},
        {"options": WIDE}, {"seed": WIDE}, {"budget": {"bits": LONG}}, {"calibration": {"source": WIDE}},
        {"calibration": {LONG: WIDE}},
    ],
    ids=lambda values: next(iter(values))[:8].encode("ascii", "replace").decode().replace("\0", ""),
)  # fmt: skip
def test_recipes(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(cut(values)), encoding="utf-8")
    with pytest.raises(QEError) as caught:
        read_recipe(recipe_file=tmp_path / "recipe.json").resolved()
    assert short(caught.value), str(caught.value)[:2000]


def cut(value: object) -> object:
    """The value in a size that a recipe may have."""
    if isinstance(value, dict):
        return {key[:6000]: cut(inside) for key, inside in value.items()}
    if isinstance(value, list):
        return [cut(inside) for inside in value[:5]]
    return value[:8] if isinstance(value, str) and value.startswith("x") else value


@pytest.mark.parametrize(
    "text", [f"{'k' * 20000}: 1\n{'k' * 20000}: 2\n", f"seed: !!float {'k' * 20000}\n", f"seed: !{'k' * 20000} 1\n"]
)
def test_yaml(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(QEError) as caught:
        read_recipe(recipe_file=tmp_path / "recipe.yaml")
    assert len(str(caught.value)) < 700


def test_an_unknown_name_is_cut_off() -> None:
    error = UnknownNameError("method", LONG, ["rtn"])
    assert short(error)
    assert "Known: rtn." in error.remedy


def test_a_record_that_differs_in_everything() -> None:
    damaged = {"qe_edge": WIDE, "model": {LONG: 1}, "recipe": {f"{i}{LONG}": WIDE for i in range(50)}}
    now = {"qe_edge": "1", "model": {}, "recipe": {"seed": 0}}
    text = in_one_line(changes(damaged, now))
    assert text.isprintable()
    assert len(text) < 500
    assert text.endswith("more")


def test_a_version_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format_version": LONG}), encoding="utf-8")
    with pytest.raises(QEError) as caught:
        read_manifest(tmp_path)
    assert short(caught.value)
