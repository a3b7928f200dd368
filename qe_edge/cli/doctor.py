"""`qe-edge doctor`: what this machine can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from qe_edge.cli.options import Command
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from qe_edge import doctor
    from qe_edge.cli import tables
else:
    doctor = lazy_module("qe_edge.doctor")
    tables = lazy_module("qe_edge.cli.tables")


@click.command("doctor", cls=Command, example="qe-edge doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(as_json: bool) -> None:
    """Show what this machine can do.

    Everything that is missing comes with its remedy.
    """
    diagnosis = doctor.examine()
    if as_json:
        click.echo(diagnosis.to_json())
        return
    marks = {doctor.OK: "ok", doctor.MISSING: "-"}
    tables.print_table(
        ("", "", "State", "Found", "Remedy"),
        [
            (item.group, item.name, marks.get(item.state, "WRONG"), item.detail, item.remedy)
            for item in diagnosis.findings
        ],
    )
    click.echo(
        "QE-Edge works here." if diagnosis.healthy else "QE-Edge cannot work here until what is WRONG is mended."
    )
