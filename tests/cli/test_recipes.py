"""A recipe file with options over it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qe_edge.cli.recipes import read_recipe
from tests.cli.running import Run

FILE = """
scheme: w4a16
modules: [visual, merger]
preset: paper
options: {experts: 4, rho: 0.1}
calibration: {source: demo, samples: 16}
seed: 7
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(FILE)
    return path


def test_without_anything_the_defaults_hold() -> None:
    recipe = read_recipe()
    assert (recipe.method, recipe.scheme, recipe.modules, recipe.seed) == ("qe", "w4a8", ("language",), 0)


def test_a_file_alone(file: Path) -> None:
    recipe = read_recipe(recipe_file=file, scheme=None, seed=None)
    assert (recipe.scheme, recipe.modules, recipe.preset, recipe.seed) == ("w4a16", ("visual", "merger"), "paper", 7)
    assert recipe.options == {"experts": 4, "rho": 0.1}
    assert recipe.calibration.samples == 16


def test_options_win_over_the_file_and_leave_the_rest_of_it(file: Path) -> None:
    recipe = read_recipe(
        recipe_file=file, scheme="w3a16", modules=" language , visual", samples=8, settings=["experts=2"], seed=0
    )
    assert (recipe.scheme, recipe.modules, recipe.preset, recipe.seed) == ("w3a16", ("language", "visual"), "paper", 0)
    assert recipe.options == {"experts": 2, "rho": 0.1}
    assert (recipe.calibration.source, recipe.calibration.samples) == ("demo", 8)


@pytest.mark.parametrize(
    ("text", "value"), [("cs_guard=false", False), ("rho=0.25", 0.25), ("router=tri", "tri"), ("em_steps=0", 0)]
)
def test_values_of_set_have_their_types(text: str, value: object) -> None:
    key = text.partition("=")[0]
    assert read_recipe(settings=[text]).options == {key: value}


def test_the_recipe_that_a_dry_run_prints_is_a_recipe_file(cli: Run, tmp_path: Path) -> None:
    outcome = cli("quantize", "demo", "-o", tmp_path / "x", "--dry-run", "--samples", "8", "--set", "experts=2")
    assert outcome.code == 0, outcome.err
    text = outcome.out.partition("\n\n")[0]
    (tmp_path / "printed.yaml").write_text(text)
    assert read_recipe(recipe_file=tmp_path / "printed.yaml").options["experts"] == 2
    assert yaml.safe_load(text)["calibration"] == {"source": "demo", "samples": 8}
