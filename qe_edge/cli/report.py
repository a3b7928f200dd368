"""`qe-edge report`: a report's data as a page for reading."""

from __future__ import annotations

import warnings
from pathlib import Path

import click

from qe_edge import report as reports
from qe_edge.cli.inputs import find_report
from qe_edge.cli.options import Command, output_option, overwrite_option
from qe_edge.cli.outputs import check_output_file
from qe_edge.system.errors import QENotice


@click.command("report", cls=Command, example="qe-edge report report.json -o report.html")
@click.argument("file", metavar="FILE.json", type=click.Path(path_type=Path))
@output_option("File for the page.")
@click.option(
    "--device-json",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What the plugin's device kit wrote on a GPU (plugins/DEVICE.md); shown in the page.",
)
@overwrite_option()
def command(file: Path, output: Path, device_json: Path | None, overwrite: bool) -> None:
    """Make a page of a report's data.

    FILE.json comes from 'validate' or 'deploy'; the page is one self-contained HTML file. It says so if checkpoint,
    graphs or engines beside FILE.json are no longer those that were measured.
    """
    source = find_report(file)
    check_output_file(output, overwrite=overwrite)
    device = reports.load_device_check(device_json) if device_json is not None else None
    report = reports.load_report(source)
    changes = reports.find_changes(report, source)
    for change in changes:
        warnings.warn(change, QENotice, stacklevel=1)
    reports.write_page(report.model_copy(update={"notes": [*report.notes, *changes]}), output, device)
    click.echo(f"Wrote '{output}'.")
