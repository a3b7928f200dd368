"""docs/method.md holds every section, equation and theorem that the code names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qe_edge.methods.qe_options import QuantExpertsOptions

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
SECTIONS = set(re.findall(r"^#+ (\d+(?:\.\d+)?)\.? ", PAGE, re.M))
EQUATIONS = set(re.findall(r"\\tag\{(\d+)\}", PAGE))
THEOREMS = set(re.findall(r"^\| T(\d+) \|", PAGE, re.M))
ROOMS = ("qe_edge", "export", "calibration", "plugins", "benchmarks", "examples", "tests")
KINDS = (".py", ".h", ".cuh", ".cu", ".cpp")
SOURCES = sorted(
    path for room in ROOMS for path in (ROOT / room).rglob("*") if path.suffix in KINDS and "build" not in path.parts
)

SECTION = re.compile(r"docs/method\.md,\s+section (\d+(?:\.\d+)?)")
EQUATION = re.compile(r"\beq(?:uation)?s?\.? (\d+)(?: ?(?:-|to|and) ?(\d+))?")
THEOREM = re.compile(r"\btest_T(\d+)_|\bT(\d+) of docs/method")


def cited(pattern: re.Pattern[str]) -> dict[str, Path]:
    """Every number that the code cites, and one file that does."""
    found = {}
    for path in SOURCES:
        for match in pattern.finditer(path.read_text(encoding="utf-8")):
            found.update({number: path for number in match.groups() if number})
    return found


@pytest.mark.parametrize(("pattern", "known"), [(SECTION, SECTIONS), (EQUATION, EQUATIONS), (THEOREM, THEOREMS)])
def test_what_the_code_cites_exists(pattern: re.Pattern[str], known: set[str]) -> None:
    citations = cited(pattern)
    assert len(citations) > 3
    assert {number: path for number, path in citations.items() if number not in known} == {}


def test_no_specification_is_cited_that_is_not_here() -> None:
    stray = re.compile(r"\(specification|specification \d|specification's")
    assert [path for path in SOURCES if path != Path(__file__) and stray.search(path.read_text(encoding="utf-8"))] == []


def test_every_theorem_is_a_test() -> None:
    assert cited(THEOREM).keys() >= THEOREMS


def test_options_that_the_page_names_exist() -> None:
    table = re.findall(r"^\| \$.*\| `(\w+)` \|$", PAGE, re.M)
    chosen = re.findall(r"`(\w+): (\w+)`", PAGE)
    assert len(table) > 3
    assert len(chosen) > 3
    assert {*table, *(name for name, _ in chosen)} - QuantExpertsOptions.model_fields.keys() == set()
    for name, value in chosen:
        assert QuantExpertsOptions.model_validate({name: value})
