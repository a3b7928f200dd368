"""Write a report as JSON and as one self-contained HTML page, and read the JSON."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import ValidationError

from qe_edge.models.texts import is_unicode
from qe_edge.report import figures, wording
from qe_edge.report.device_check import DeviceCheck
from qe_edge.system.atomic import atomic_file
from qe_edge.system.errors import ArtifactError, shown
from qe_edge.system.json_files import read_json_table
from qe_edge.validate.schema import REPORT_VERSION, Report

MAX_REPORT_BYTES = 256 << 20


def write_report(report: Report, json_path: Path, html_path: Path) -> None:
    """Write the report as data and as a page; each file appears only when it is complete.

    Raises:
        ResourceError: If the disk is full.

    Example:
        >>> from qe_edge.validate import validate  # doctest: +SKIP
        >>> report = validate("demo", Path("checkpoint"), Path("engines/cpu"), "demo")  # doctest: +SKIP
        >>> write_report(report, Path("report.json"), Path("report.html"))  # doctest: +SKIP
    """
    with atomic_file(json_path) as part:
        part.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    write_page(report, html_path)


def write_page(report: Report, html_path: Path, device: DeviceCheck | None = None) -> None:
    """Write the page alone, with the results of a device check if there is one.

    Raises:
        ResourceError: If the disk is full.

    Example:
        >>> from qe_edge.report.device_check import load_device_check  # doctest: +SKIP
        >>> report, device = load_report(Path("report.json")), load_device_check(Path("device.json"))  # doctest: +SKIP
        >>> write_page(report, Path("report.html"), device)  # doctest: +SKIP
    """
    page = render_page(report, device)
    with atomic_file(html_path) as part:
        part.write_text(page, encoding="utf-8")


def load_report(path: Path) -> Report:
    """Read the JSON file that `write_report` wrote.

    Raises:
        ArtifactError: If the file is missing, too large, or no report of this version.

    Example:
        >>> report = load_report(Path("out/demo/report.json"))  # doctest: +SKIP
        >>> report.contender("quantized").accuracy.share()  # doctest: +SKIP
    """
    if not path.is_file():
        raise ArtifactError(f"There is no report '{path}'.", "Give the report.json of 'qe-edge validate'.")
    values = read_json_table(path, remedy="Validate again.", limit=MAX_REPORT_BYTES)
    if not is_unicode(json.dumps(values, ensure_ascii=False)):
        raise ArtifactError(f"'{path}' holds half a surrogate pair, which is no character.", "Validate again.")
    if values.get("kind") == "actions":
        raise ArtifactError(f"'{path}' is a report of actions, which has no page.", "Read the file as it is.")
    if values.get("version") != REPORT_VERSION:
        raise ArtifactError(
            f"'{path}' is no report that this version reads: its version is {shown(values.get('version'))}, "
            f"and {REPORT_VERSION} is read.",
            "Validate again.",
        )
    try:
        return Report.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ArtifactError(
            f"'{path}' is no report that this version reads: {where}: {first['msg'].removeprefix('Value error, ')}.",
            "Validate again.",
        ) from error


def render_page(report: Report, device: DeviceCheck | None = None) -> str:
    """The page as text; everything that comes from the report is escaped.

    Example:
        >>> render_page(load_report(Path("out/demo/report.json")))[:15]  # doctest: +SKIP
    """
    environment = Environment(
        loader=PackageLoader("qe_edge.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= wording.FILTERS
    style = files("qe_edge.report").joinpath("style.css").read_text(encoding="utf-8")
    return environment.get_template("page.html.j2").render(
        report=report,
        device=device,
        style=Markup(style),  # noqa: S704 - our own file
        cards=wording.headline(report),
        limits=wording.limits(report),
        figures=figures.draw_all(report),
        roles=wording.ROLES,
        runtimes=wording.RUNTIMES,
        kinds=wording.KINDS,
        kind_names=wording.kind_names(report),
        stages=wording.by_stage(report.sizes),
    )
