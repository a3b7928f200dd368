"""`qe-edge validate`: how far the quantized model is from the original."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qe_edge.cli.options import Command, evaluation_options, output_option, overwrite_option, plugin_library_option
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from qe_edge.cli import validate_work
else:
    validate_work = lazy_module("qe_edge.cli.validate_work")


@click.command("validate", cls=Command, example="qe-edge validate demo checkpoint --engines engines -o report.json")
@click.argument("model")
@click.argument("checkpoint", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--engines", type=click.Path(path_type=Path), metavar="ENGINES", help="Engines to validate too, of one target."
)
@click.option("--onnx", type=click.Path(path_type=Path), metavar="ONNX", help="Exported graphs, for their sizes.")
@plugin_library_option()
@output_option("File for the report as JSON; the page for reading is written beside it as .html.")
@evaluation_options()
@overwrite_option()
def command(  # noqa: PLR0913 - an argument for every option
    *,
    model: str,
    checkpoint: Path,
    engines: Path | None,
    onnx: Path | None,
    plugin_library: Path | None,
    output: Path,
    evaluation: str,
    limit: int | None,
    overwrite: bool,
) -> None:
    """Compare quantized and original model.

    MODEL is the original; DIR is the quantized checkpoint, or the output of 'deploy', whose graphs and engines are then
    taken too. Of a model that makes actions the error of its actions is reported; there is no page of it.
    """
    folders = validate_work.choose_folders(checkpoint, engines, onnx, output, overwrite=overwrite)
    page = validate_work.run(model, folders, output, evaluation, plugin_library=plugin_library, limit=limit)
    click.echo(f"Wrote '{output}'." if page is None else f"Wrote '{output}' and '{page}'.")
