"""docs/zoo.md has a row for every family, none for what is not supported, and errors as small as tests ask for."""

from __future__ import annotations

import re
from pathlib import Path

from qe_edge.models import FAMILIES

PAGE = Path(__file__).parent.parent / "docs" / "zoo.md"
LINE = re.compile(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \| (\d+) \| ([^|]+) \| ([^|]+) \|", re.MULTILINE)
ROWS = LINE.findall(PAGE.read_text(encoding="utf-8"))


def test_every_family_has_a_row() -> None:
    assert list(dict.fromkeys(row[0] for row in ROWS)) == list(FAMILIES)


def test_errors_and_answers() -> None:
    for family, cases, error, same in ROWS:
        assert float(error) < 1e-5, family
        assert same in ("-", f"{cases} of {cases}"), family


def test_engines_are_of_models_of_the_first_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    models = set(re.findall(r"^\| `\w+` \| ([^|]+) \|", page, re.MULTILINE))
    engines = re.findall(r"^\| ([^|`]+) \| ((?:\d+|-)(?:, (?:\d+|-)){2,3}) \|$", page, re.MULTILINE)
    assert len(engines) >= len(list(FAMILIES)) // 2
    assert {name for name, _ in engines} <= models
