"""`qe-edge doctor`: what this machine can do."""

from __future__ import annotations

import click

from qe_edge.cli.options import Command
from qe_edge.cli.tables import print_table


@click.command("doctor", cls=Command, example="qe-edge doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(as_json: bool) -> None:
    """Show what this machine can do.

    Everything that is missing comes with its remedy.
    """
    from qe_edge.doctor import MISSING, OK, examine

    diagnosis = examine()
    if as_json:
        click.echo(diagnosis.to_json())
        return
    marks = {OK: "ok", MISSING: "-"}
    print_table(
        ("", "", "State", "Found", "Remedy"),
        [
            (item.group, item.name, marks.get(item.state, "WRONG"), item.detail, item.remedy)
            for item in diagnosis.findings
        ],
    )
    click.echo(
        "QE-Edge works here." if diagnosis.healthy else "QE-Edge cannot work here until what is WRONG is mended."
    )
