"""The page stands alone, shows what the report holds, and takes nothing from it for markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qe_edge.report import load_report, render_page, write_report
from qe_edge.system.errors import ArtifactError
from qe_edge.validate.schema import Report

HOSTILE = "</p></style></svg><script>alert(1)</script><img src=x onerror=alert(2)> \" ' & $\\frac{ {{ 7*7 }}"


class Elements(HTMLParser):
    """Collects tags with attributes, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def poison(value: object) -> object:
    """A part of a report with markup in place of every string."""
    if isinstance(value, dict):
        return {key: poison(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [poison(entry) for entry in value]
    return HOSTILE if isinstance(value, str) else value


def test_nothing_is_loaded_from_elsewhere(report: Report) -> None:
    page = render_page(report)
    assert "http://" not in page
    assert "https://" not in page
    for tag, attributes in Elements(page).tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base"}
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:image/png;base64,")), (tag, target)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_hostile_text_stays_text(report: Report) -> None:
    values = report.model_dump(mode="json")
    values["model"] = values["qe_edge"] = values["created"] = HOSTILE
    for part in (
        "examples",
        "layers",
        "stream",
        "routing",
        "sizes",
        "targets",
        "notes",
        "recipe",
        "machine",
        "latency",
    ):
        kept = {"role": None, "runtime": None}
        values[part] = poison(values[part])
        del kept
    values["evaluation"]["source"] = HOSTILE
    values["evaluation"]["kinds"] = {HOSTILE: 100}
    values["recipe"]["modules"] = [HOSTILE]
    for example, original in zip(values["examples"], report.examples, strict=True):
        for answer, known in zip(example["answers"], original.answers, strict=True):
            answer["role"] = known.role
    for layer in values["bits"]["layers"]:
        layer["name"] = HOSTILE
    values["bits"]["groups"] = {HOSTILE: values["bits"]["groups"]["visual"]}
    plain = Elements(render_page(report))
    found = Elements(render_page(Report.model_validate(values)))
    assert {tag for tag, _ in found.tags} <= {tag for tag, _ in plain.tags}
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert HOSTILE in found.text
    assert "{{ 7*7 }}" in found.text


def test_the_page_says_what_the_report_holds(report: Report) -> None:
    text = " ".join(Elements(render_page(report)).text.split())
    for expected in (
        "some-model", "w3a16", "78.0 %", "41 of 50", "22.0 %", "0.00123", "99.5 %", "10⁻⁷", "12.5 ms", "400 MB",
        "what color is the shape?", "Something to know.", "and 3 smaller",
        "The engine for 'rtx' was built, and has not yet been run on hardware.",
        "hold codes of fewer than 4 bits as INT4",
    ):  # fmt: skip
        assert expected in text, expected


def test_parts_that_are_missing_leave_no_trace(report: Report) -> None:
    bare = report.model_copy(
        update={
            "engine": None,
            "latency": [],
            "routing": [],
            "targets": [],
            "examples": [],
            "sizes": [],
            "contenders": [row.model_copy(update={"shuffled": None, "size": None}) for row in report.contenders[:2]],
        }
    )
    text = Elements(render_page(bare)).text
    assert "None" not in text
    assert "Speed and memory" not in text
    assert "Who does the work" not in text
    assert "says nothing about speed" in text


def test_figures_have_words_for_those_who_cannot_see_them(report: Report) -> None:
    tags = Elements(render_page(report)).tags
    drawings = [attributes for tag, attributes in tags if tag == "svg"]
    assert len(drawings) == 5
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in drawings)
    assert all(attributes["alt"] for tag, attributes in tags if tag == "img")


def test_ids_are_unique_and_colours_come_from_the_page(report: Report) -> None:
    page = render_page(report)
    ids = [attributes["id"] for _, attributes in Elements(page).tags if "id" in attributes]
    referred = set(re.findall(r"(?:url\(#|href=\"#)([\w-]+)", page))
    assert referred <= set(ids)
    doubled = {name for name in referred if ids.count(name) > 1}
    assert not doubled
    body = page[page.index("<main") :]
    assert "#0" not in re.sub(r"&#\d+;|(?:url\(#|href=\"#)[\w-]+", "", body)
    used = set(re.findall(r"var\((--[\w-]+)\)", page))
    defined = set(re.findall(r"(--[\w-]+):", page))
    assert used <= defined


def test_files_are_written_and_read_again(report: Report, tmp_path: Path) -> None:
    data, page = tmp_path / "out" / "report.json", tmp_path / "out" / "report.html"
    write_report(report, data, page)
    assert load_report(data) == report
    assert page.read_text(encoding="utf-8") == render_page(report)
    assert sorted(path.name for path in data.parent.iterdir()) == ["report.html", "report.json"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not valid JSON"),
        ("[]", "no JSON table"),
        ('{"version": 2}', "no report that this version reads: qe_edge"),
        ('{"version": 1}', "its version is 1, and 2 is read"),
        ("\x00", "not valid JSON"),
    ],
)
def test_a_file_that_is_no_report(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError, match=words) as caught:
        load_report(path)
    assert caught.value.remedy == "Validate again."
    with pytest.raises(ArtifactError, match="There is no report"):
        load_report(tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("latency.0.steps", {}, "latency.0: the step 'decode' is missing"),
        ("latency.0.steps.decode.median", -1, "steps.decode.median"),
        ("latency.0.steps.decode.median", "Infinity", "steps.decode.median"),
        ("recipe.modules", ["language", 0.5], "the recipe has no method, scheme and modules"),
        ("latency.0.setting", "\ud800", "holds half a surrogate pair"),
        ("recipe.modules", None, "the recipe has no method, scheme and modules"),
        ("contenders", [], "the contenders are not the original"),
        ("contenders.0.role", "engine", "the contenders are not the original"),
        ("contenders.1.accuracy.correct.open", 51, "more answers are right than there are questions"),
        ("routing.0.all", [], "routing.0.all"),
        ("routing.0.vision", [4.0], "routing.0.vision.0"),
        ("routing.1.layers", [], "routing.1.layers"),
        ("bits.layers.0.bits.weights", 0, "a quantized layer has no weights"),
        ("bits.parameters", 0, "bits.parameters"),
        ("layers.0.heldout.all", 1e300, "layers.0.heldout.all"),
        ("machine.memory_bytes", 10**400, "machine.memory_bytes"),
    ],
)
def test_values_that_no_page_can_show(report: Report, tmp_path: Path, place: str, value: object, words: str) -> None:
    path = tmp_path / "report.json"
    table = report.model_dump(mode="json")
    *parents, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    node: Any = table
    for part in parents:
        node = node[part]
    node[last] = value
    path.write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(ArtifactError, match=re.escape(words)) as caught:
        load_report(path)
    assert caught.value.remedy == "Validate again."
