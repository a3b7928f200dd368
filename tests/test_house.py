"""The house as STYLE wants it: rooms, few loose modules, one front door."""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

import qe_edge

ROOT = Path(__file__).parents[1]
ROOMS = ROOT / "qe_edge"
LONGEST = 60  # lines of a function, with its docstring
SOURCES = [  # each file once, whatever Python thinks of links
    path
    for room in ("qe_edge", "export", "calibration", "plugins/prepack")
    for path in sorted((ROOT / room).rglob("*.py"))
    if not any(parent.is_symlink() for parent in path.parents)
]
# Rooms whose public functions and classes all show their use; a new room is added when it is complete.
SHOWN = ("system", "numerics", "checkpoint", "layers", "calibration", "reconstruction", "budget", "methods",
         "recipes", "quantization", "deploy", "demo", "qe_edge", "export", "prepack", "runtime", "validate",
         "report", "predict", "server", "models", "formats")  # fmt: skip
RECORDS = ("dataclass", "NamedTuple", "TypedDict", "BaseModel", "Protocol", "Enum", "Options", "Error",
           "StrictTable", "Strict", "_Strict", "_Time", "Sealed", "Part", "FolderManifest", "GraphFile", "Values",
           "Sizes", "Section", "ModelFamily", "QwenVL", "VisionEncoder")  # fmt: skip
OPTIONAL = ("fastapi", "prometheus_client", "uvicorn")  # of extras that not every machine has
LINKED = {"export": "../export", "calibration": "../calibration", "prepack": "../plugins/prepack"}


def test_few_modules_lie_loose() -> None:
    loose = [path.name for path in ROOMS.glob("*.py")]
    assert len(loose) <= 6, loose


def test_every_room_says_what_it_is() -> None:
    rooms = [path for path in ROOMS.iterdir() if path.is_dir() and list(path.glob("*.py"))]
    assert len(rooms) > 15
    for room in rooms:
        assert (room / "__init__.py").read_text(encoding="utf-8").startswith('"""'), room


@pytest.mark.parametrize("room", LINKED)
def test_folders_beside_the_package_belong_to_it_without_an_installation(room: str) -> None:
    assert (ROOMS / room).readlink() == Path(LINKED[room])
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import qe_edge.{room} as room; print(room.__file__)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == ROOMS / room / "__init__.py"


@pytest.mark.parametrize("name", qe_edge.__all__)
def test_public_names_are_there(name: str) -> None:
    assert getattr(qe_edge, name)


def test_no_function_is_longer_than_a_page() -> None:
    assert len(SOURCES) > 200
    functions = [
        (path, node)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    long = [
        f"{path.relative_to(ROOT)}: {node.name} has {size} lines"
        for path, node in functions
        if (size := (node.end_lineno or node.lineno) - node.lineno + 1) > LONGEST
    ]
    assert long == []


def test_examples_in_docstrings_do_what_they_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [path for path in SOURCES if ">>> " in path.read_text(encoding="utf-8")]
    assert len(files) > 15
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE  # so that a long line of output may be broken
    for number, path in enumerate(files):
        try:
            module = importlib.import_module(_dotted(path))
        except ModuleNotFoundError as missing:
            if missing.name not in OPTIONAL:
                raise
            continue
        folder = tmp_path / str(number)  # the current folder of a module's examples
        folder.mkdir()
        monkeypatch.chdir(folder)
        with patch.object(sys, "path", [*sys.path]), patch.dict(os.environ):
            found = doctest.testmod(module, optionflags=flags)
        assert found.failed == 0, path


def test_public_names_have_an_example() -> None:
    without = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in SOURCES
        if _room(path) in SHOWN and not _is_part_of_a_family(path)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        if not _is_record(node) and "Example:" not in (ast.get_docstring(node) or "")
    ]
    assert without == []


def _is_record(node: ast.stmt) -> bool:
    """Whether a class only holds values, or is an error, a protocol or one of many families: other names show it."""
    if not isinstance(node, ast.ClassDef):
        return False
    names = [ast.unparse(part) for part in (*node.bases, *node.decorator_list)]
    return any(name.partition("(")[0].endswith(RECORDS) for name in names)


def _is_part_of_a_family(path: Path) -> bool:
    """Whether a file holds the graphs of one model family, which `ModelFamily.graphs` makes."""
    return path.stem.endswith("_graphs") and path.with_stem(path.stem.removesuffix("_graphs")).exists()


def _room(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[1] if parts[0] in ("qe_edge", "plugins") and len(parts) > 2 else parts[0]


def _dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[parts[0] == "plugins" :]
    parts = parts if parts[0] == "qe_edge" else ("qe_edge", *parts)
    return ".".join(part for part in parts if part != "__init__")
