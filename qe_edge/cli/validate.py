"""`qe-edge validate`: how far the quantized model is from the original."""

from __future__ import annotations

from pathlib import Path

import click

from qe_edge.cli.options import Command, evaluation_options, output_option, overwrite_option, plugin_library_option


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
    taken too.
    """
    from qe_edge.cli.validate_work import choose_folders, run

    folders = choose_folders(checkpoint, engines, onnx, output, overwrite=overwrite)
    page = run(model, folders, output, evaluation, plugin_library=plugin_library, limit=limit)
    click.echo(f"Wrote '{output}' and '{page}'.")
