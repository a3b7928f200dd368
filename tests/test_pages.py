"""README and the pages of docs/ are true to the repository: links, paths, options of commands, code that runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from qe_edge.cli.application import COMMANDS, application

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*(ROOT / "docs").glob("**/*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "plugins/README.md"))]
)
RUN = tuple(ROOT / name for name in ("README.md", "docs/quickstart.md", "docs/python.md"))  # .ci/run runs every block
FENCE = re.compile(r"^(?:<!-- ci:(?P<mark>\w+) -->\n)?```(?P<language>\w*)\n(?P<body>.*?)^```$", re.M | re.S)
LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\((?P<to>[^)\s]+)\)")
# a file or folder in backticks; `out/` and the like are made by commands
FILE = re.compile(r"`((?:qe_edge|export|calibration|plugins|benchmarks|tests|docs|examples|\.ci)/[\w./-]*)`")
MADE = ("qe_edge/lib", "plugins/build")  # by build-plugin
README_LINES = 130


def blocks(page: Path) -> Iterator[re.Match[str]]:
    return FENCE.finditer(page.read_text(encoding="utf-8"))


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


@cache
def anchors(page: Path) -> set[str]:
    """The ids that headings get, on GitHub and in mkdocs."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    words = [re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower() for heading in headings]
    return {re.sub(r"[-\s]+", "-", word) for word in words}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    broken = []
    for match in LINK.finditer(prose(page)):
        to = urlsplit(match["to"])
        if to.scheme:
            if to.scheme != "https" or not re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", to.netloc):
                broken.append(match["to"])
            continue
        target = (page.parent / to.path).resolve() if to.path else page
        if not target.exists() or (to.fragment and to.fragment not in anchors(target)):
            broken.append(match["to"])
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    named = [name for name in FILE.findall(page.read_text(encoding="utf-8")) if not name.startswith(MADE)]
    assert [name for name in named if not (ROOT / name).exists() and not (page.parent / name).exists()] == []


def spoken() -> Iterator[tuple[str, str]]:
    """Every `qe-edge` command line on the pages, with its page."""
    for page in PAGES:
        lines = [line for block in blocks(page) if block["language"] == "bash" for line in block["body"].splitlines()]
        for line in lines:
            for part in re.split(r"&&|;", line.partition(" #")[0]):
                if part.strip().startswith("qe-edge "):
                    yield part.strip(), str(page.relative_to(ROOT))


@pytest.mark.parametrize(("line", "page"), list(spoken()))
def test_commands_on_the_pages_exist(line: str, page: str) -> None:
    del page
    name, *words = shlex.split(line)[1:]
    assert name in COMMANDS
    command = application.get_command(application.make_context("qe-edge", [], resilient_parsing=True), name)
    assert command is not None
    known = {option for parameter in command.params for option in parameter.opts}
    assert [word for word in words if word.startswith("-") and word not in known] == []


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_every_block_runs_in_ci(page: Path) -> None:
    found = [(block["language"], block["mark"]) for block in blocks(page)]
    assert len(found) > 1
    assert [block for block in found if block[1] is None] == []
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    name = page.relative_to(ROOT)
    assert [mark for _, mark in found if f"page_step {name} {mark}\n" not in ci] == []


def test_the_method_on_the_page_quantizes() -> None:
    import torch

    from qe_edge.methods import LinearProblem
    from qe_edge.numerics.schemes import get_scheme

    code = next(block["body"] for block in blocks(ROOT / "docs/extending.md") if block["language"] == "python")
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102 - a page of ours
    method = names["ClippedRounding"](names["ClippedOptions"](quantile=0.9))
    weight = torch.tensor([[100.0] + [7.0] * 63])
    decoded = method.quantize(LinearProblem("one", weight, get_scheme("w4a8"), None, seed=0)).weight.decode()
    assert decoded.tolist() == [[7.0] * 64]


def test_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_every_page_is_in_the_site() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nplugins:")[0]
    pages = [str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert [page for page in pages if page not in navigation] == []


def test_included_files_are_there() -> None:
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.lstrip().startswith("--8"):  # as the extension snippets reads it; a formatter may break it
                found = re.fullmatch(r'\s*--8<-- "(?P<file>[^"]+)"', line)
                assert found, f"{page}: {line}"
                assert (ROOT / found["file"]).is_file(), f"{page}: {line}"
