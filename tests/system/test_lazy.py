"""Lazy modules: nothing is imported early, and what their strings name is what mypy and the rooms' contract see."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from qe_edge.models import FAMILIES
from qe_edge.system.lazy import lazy_module
from tests.test_house import ROOT, SOURCES

HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime")
OPTIONAL = ("tensorrt", "tensorrt_rtx")  # nobody needs them for development


def test_it_is_imported_at_the_first_use_of_a_name() -> None:
    code = (
        "import sys; from qe_edge.system.lazy import lazy_module; xml = lazy_module('xml.dom.minidom'); "
        "before = 'xml.dom.minidom' in sys.modules; found = xml.parseString('<a/>').documentElement.tagName; "
        "print(before, found, 'xml.dom.minidom' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "a", "True"]


def test_names_are_the_module_s_own() -> None:
    lazy = lazy_module("fractions")
    import fractions

    assert lazy.Fraction is fractions.Fraction
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = lazy.nothing_of_this_name


def test_a_module_that_is_missing_is_named_when_it_is_used() -> None:
    lazy = lazy_module("no_such_library")
    assert not hasattr(lazy, "__wrapped__")  # as inspect and doctest ask every object
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        _ = lazy.anything


def test_a_lazy_module_is_the_one_that_mypy_and_the_contract_of_rooms_see() -> None:
    uses = [(path, name, module) for path in SOURCES for name, module in _lazy_modules(path)]
    assert len(uses) > 20
    for path, name, module in uses:
        where = path.relative_to(ROOT)
        assert _imported_for_types(path).get(name) == module, f"{where}: import {module} as {name} for TYPE_CHECKING"
        assert module.partition(".")[0] in OPTIONAL or find_spec(module) is not None, f"{where}: no module {module}"


def test_files_of_families_are_light() -> None:
    code = (
        "import sys; from qe_edge.models import FAMILIES; found = [FAMILIES[name].__name__ for name in FAMILIES]; "
        f"print(len(found), [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{len(list(FAMILIES))} []\n"


def test_names_that_load_late_are_there() -> None:
    packages = [path for path in SOURCES if "__getattr__ = lazy_names(" in path.read_text(encoding="utf-8")]
    assert len(packages) > 2
    for path in packages:
        package = importlib.import_module(".".join(path.relative_to(ROOT).parent.parts))
        for name in package.__all__:
            home = getattr(getattr(package, name), "__module__", None)
            seen = _imported_for_types(path).get(name, f"{home}.{name}")
            assert seen == f"{home}.{name}", f"{path.relative_to(ROOT)}: import {name} from {home} for TYPE_CHECKING"


def _lazy_modules(path: Path) -> list[tuple[str, str]]:
    """What a file calls its lazy modules, and their full names."""
    return [
        (node.targets[0].id, ast.literal_eval(node.value.args[0]))
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id == "lazy_module"
    ]


def _imported_for_types(path: Path) -> dict[str, str]:
    """What a file imports under `if TYPE_CHECKING`, by the name that it has there."""
    found = {}
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for line in node.body:
                if isinstance(line, ast.Import):
                    found |= {alias.asname or alias.name: alias.name for alias in line.names}
                if isinstance(line, ast.ImportFrom):
                    found |= {alias.asname or alias.name: f"{line.module}.{alias.name}" for alias in line.names}
    return found


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))
