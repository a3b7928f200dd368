"""A recipe file with options over it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from qe_edge.cli.recipes import read_recipe
from qe_edge.quantization.run_record import changes, make_record
from qe_edge.recipes.recipe import make_recipe
from qe_edge.system.errors import QENotice, RecipeError
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
    ("text", "value"),
    [
        ("clip=false", False),
        ("rho=0.25", 0.25),
        ("router=triangle", "triangle"),
        ("em_steps=0", 0),
    ],
)
def test_values_of_set_have_their_types(text: str, value: object) -> None:
    key = text.partition("=")[0]
    assert read_recipe(settings=[text]).options == {key: value}


EARLIER = {"cs_mode": "scale", "cs_guard": False, "router": "tri", "expert_weighting": "lqeromega", "rho": 0.1}
CURRENT = {
    "independent_channels": "scale", "guard_independent_channels": False, "router": "triangle",
    "expert_weighting": "lqer_omega", "rho": 0.1,
}  # fmt: skip


def test_earlier_names_of_options_are_read_with_a_notice() -> None:
    with pytest.warns(QENotice, match=r"are read: 'cs_mode: scale'.*\. Write 'independent_channels: scale'") as told:
        recipe = make_recipe(options=EARLIER)
    assert recipe.options == CURRENT
    assert "rho" not in str(told[0].message)


def test_a_new_name_wins_over_its_earlier_one() -> None:
    with pytest.warns(QENotice, match="are read: 'cs_mode: drop'"):
        recipe = make_recipe(options={"independent_channels": "scale", "cs_mode": "drop"})
    assert recipe.options == {"independent_channels": "scale"}


def test_names_of_now_are_read_without_a_notice(recwarn: pytest.WarningsRecorder) -> None:
    assert make_recipe(options=CURRENT).options == CURRENT
    assert not recwarn.list


def test_a_run_with_earlier_names_is_the_same_run() -> None:
    now = make_record({}, make_recipe(options=CURRENT).resolved())
    kept = {key: value for key, value in now["recipe"]["options"].items() if key not in CURRENT}
    before = {**now, "recipe": {**now["recipe"], "options": {**kept, **EARLIER}}}
    assert changes(before, now) == []


def test_the_recipe_that_a_dry_run_prints_is_a_recipe_file(cli: Run, tmp_path: Path) -> None:
    outcome = cli("quantize", "demo", "-o", tmp_path / "x", "--dry-run", "--samples", "8", "--set", "experts=2")
    assert outcome.code == 0, outcome.err
    text = outcome.out.partition("\n\n")[0]
    (tmp_path / "printed.yaml").write_text(text)
    assert read_recipe(recipe_file=tmp_path / "printed.yaml").options["experts"] == 2
    assert yaml.safe_load(text)["calibration"] == {"source": "demo", "samples": 8}


ALIASES = "a: &a [x, x, x]\nb: &b [*a, *a, *a]\n"
MERGES = "base: &base {scheme: w4a8}\nnext: {<<: *base}\n"


@pytest.mark.parametrize(
    ("text", "complaint", "remedy"),
    [
        (ALIASES, "has a YAML alias in line 1", "Write every value out"),
        (MERGES, "has a YAML alias in line 1", "Write every value out"),
        ("scheme: w4a8\nmethod: rtn\nscheme: w4a16\n", "has the key 'scheme' twice", "Leave one of them out"),
        (f"seed: 0x{'f' * 5000}\n", "has a number of 5002 digits in line 1", "below 64 KiB"),
        (f"seed: 1{':1' * 4000}\n", "has a number of 8001 digits", "below 64 KiB"),
        ("[" * 4000, "nested too deeply", "Correct that line"),
        ("seed: !!timestamp soon\n", "is not valid YAML", "Correct that line"),
        ("seed: !!python/name:os.system\n", "is not valid YAML", "Correct that line"),
        ("#" * 70_000, "has 70000 bytes", "below 64 KiB"),
        ("scheme: \udcff", "is not UTF-8", "below 64 KiB"),
        ("calibration: {samples: 1000000000000}", "'calibration.samples' is wrong", "Correct the value"),
        ("options: {tokens: 1000000000000}", "'options.tokens' is wrong", "Correct the value"),
        ("options: {rho: .nan}", "'options.rho' is wrong", "Correct the value"),
        ("seed: 18446744073709551616", "'seed' is wrong", "Correct the value"),
    ],
)
def test_a_recipe_of_a_stranger(tmp_path: Path, text: str, complaint: str, remedy: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RecipeError, match=complaint) as caught:
        read_recipe(recipe_file=path)
    assert remedy in caught.value.remedy
    assert len(str(caught.value)) < 600


def test_a_recipe_that_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(RecipeError, match="is not a file"):
            read_recipe(recipe_file=path)
    for name in ("gone.yaml", "a\0b", "n" * 300):
        with pytest.raises(RecipeError, match="There is no recipe file"):
            read_recipe(recipe_file=tmp_path / name)


@pytest.mark.parametrize("value", ["&a [*a]", "[" * 3000, "x" * 100_000, "0x" + "f" * 999])
def test_values_of_set_have_the_same_bounds(value: str) -> None:
    with pytest.raises(RecipeError, match="cannot be read") as caught:
        read_recipe(settings=[f"experts={value}"])
    assert len(str(caught.value)) < 300


def test_a_preset_wins_over_the_options_of_the_file(file: Path) -> None:
    with pytest.warns(QENotice, match=r"--preset default takes the place of the options in '.*recipe\.yaml'"):
        recipe = read_recipe(recipe_file=file, preset="default", settings=["experts=2"])
    assert (recipe.preset, recipe.options) == ("default", {"experts": 2})


def test_every_option_wins_over_the_file(file: Path) -> None:
    recipe = read_recipe(recipe_file=file, bits=4.5, read_bits=5.0, calibration="pictures", method="qe")
    assert (recipe.budget.bits, recipe.budget.read_bits, recipe.calibration.source) == (4.5, 5.0, "pictures")
    assert read_recipe(recipe_file=file, method="rtn", preset="default").method == "rtn"
