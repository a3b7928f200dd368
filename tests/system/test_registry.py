"""Registries: own entries, and entries that other packages offer."""

from __future__ import annotations

from pathlib import Path

import pytest

from qe_edge.methods import METHODS, Method
from qe_edge.methods.rtn import RoundToNearest
from qe_edge.recipes.recipe import make_recipe
from qe_edge.system.errors import ExtensionError, UnknownNameError


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the search path; `offer` puts packages into it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def offer(folder: Path, package: str, entry: str, code: str, version: str = "1.0") -> None:
    """Install a package: a module of the same name, and one entry point `NAME = ATTRIBUTE` of it."""
    (folder / f"{package}.py").write_text(code, encoding="utf-8")
    description = folder / f"{package}-{version}.dist-info"
    description.mkdir()
    (description / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    name, attribute = entry.split(" = ")
    (description / "entry_points.txt").write_text(f"[qe_edge.methods]\n{name} = {package}:{attribute}\n")


def test_a_package_offers_a_method(install: Path) -> None:
    code = "from qe_edge.methods.rtn import RoundToNearest\nclass Mine(RoundToNearest): pass\n"
    offer(install, "pkg_good", "mine = Mine", code)
    assert "mine" in METHODS
    assert "mine" not in list(METHODS)  # a page and the tests list our own
    assert issubclass(METHODS["mine"], Method)
    assert METHODS.package("mine") == "pkg_good 1.0"
    assert make_recipe(method="mine").method == "mine"


def test_listing_and_checking_import_nothing(install: Path) -> None:
    offer(install, "pkg_late", "late = Mine", "raise SystemExit('imported')\n")
    assert METHODS.check("late") == "late"
    assert METHODS.package("late") == "pkg_late 1.0"


def test_an_unknown_name_is_told_what_packages_offer(install: Path) -> None:
    offer(install, "pkg_near", "zigzag = Mine", "")
    with pytest.raises(UnknownNameError) as caught:
        METHODS.check("zigzak")
    assert "Did you mean 'zigzag'?" in caught.value.remedy
    assert "gptq" in caught.value.remedy


@pytest.mark.parametrize(
    ("package", "code", "why"),
    [
        ("pkg_missing", "import a_library_that_nobody_has\n", "No module named 'a_library_that_nobody_has'"),
        ("pkg_typo", "class Mine(\n", "was never closed"),
        ("pkg_renamed", "class Other: pass\n", "has no attribute 'Mine'"),
        ("pkg_undefined", "Mine = undefined_name\n", "name 'undefined_name' is not defined"),
        ("pkg_divides", "1 / 0\n", "ZeroDivisionError"),
    ],
)
def test_a_package_that_cannot_be_imported_is_named(install: Path, package: str, code: str, why: str) -> None:
    offer(install, package, "broken = Mine", code)
    with pytest.raises(ExtensionError) as caught:
        make_recipe(method="broken")
    assert caught.value.problem.startswith(f"The method 'broken' of the package '{package} 1.0' cannot be imported:")
    assert why in caught.value.problem
    assert caught.value.remedy == "Mend that package, or uninstall it."


@pytest.mark.parametrize(
    ("package", "code"),
    [
        ("pkg_number", "Mine = 3\n"),
        ("pkg_class", "class Mine: pass\n"),
        ("pkg_function", "def Mine(options): pass\n"),
    ],
)
def test_something_else_than_a_method_is_refused(install: Path, package: str, code: str) -> None:
    offer(install, package, "other = Mine", code)
    with pytest.raises(ExtensionError) as caught:
        METHODS["other"]
    assert "is no subclass of qe_edge.methods.base.Method" in caught.value.problem
    assert "qe_edge.methods" in caught.value.remedy


def test_two_packages_with_one_name_are_told_apart(install: Path) -> None:
    offer(install, "pkg_one", "twice = Mine", "")
    offer(install, "pkg_two", "twice = Mine", "")
    with pytest.raises(ExtensionError) as caught:
        METHODS["twice"]
    assert "pkg_one 1.0, pkg_two 1.0" in caught.value.problem
    assert "Uninstall" in caught.value.remedy


def test_a_name_of_ours_stays_ours(install: Path) -> None:
    offer(install, "pkg_thief", "rtn = Mine", "raise SystemExit('imported')\n")
    assert METHODS["rtn"] is RoundToNearest
    assert METHODS.package("rtn") is None


def test_a_resumed_run_notices_another_version_of_the_package(install: Path) -> None:
    from qe_edge.quantization.run_record import environment_changes, make_record

    code = "from qe_edge.methods.rtn import RoundToNearest\nclass Mine(RoundToNearest): pass\n"
    offer(install, "pkg_grows", "grows = Mine", code)
    recipe = make_recipe(method="grows")
    before = make_record({}, recipe, {"threads": 1})
    (install / "pkg_grows-1.0.dist-info").rename(install / "pkg_grows-1.1.dist-info")
    (install / "pkg_grows-1.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: pkg_grows\nVersion: 1.1\n")
    now = make_record({}, recipe, {"threads": 1})
    assert environment_changes(before, now) == ["method: pkg_grows 1.0 then, pkg_grows 1.1 now"]
    assert "method" not in make_record({}, make_recipe(method="rtn"), {"threads": 1})["environment"]
