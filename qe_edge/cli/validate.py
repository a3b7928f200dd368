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
    from qe_edge.cli.inputs import (
        ENGINES,
        ONNX,
        built_targets,
        find_checkpoint,
        find_engines,
        find_onnx,
        is_manifest_folder,
        open_model,
        runs_here,
    )
    from qe_edge.cli.outputs import check_output_file
    from qe_edge.system.errors import InputError

    page = output.with_suffix(".html")
    if page == output:
        remedy = f"Give a name such as '{output.with_suffix('.json')}'."
        raise InputError(f"'{output}' is where the page is written, beside the data.", remedy)
    for file in (output, page):
        check_output_file(file, overwrite=overwrite)
    quantized = find_checkpoint(checkpoint)
    if engines is not None:
        chosen: Path | None = find_engines(engines)
        others: list[Path] = []
    else:
        built = built_targets(checkpoint) if (checkpoint / ENGINES).is_dir() else {}
        chosen = next((folder for name, folder in built.items() if runs_here(name)), None)
        others = [folder for folder in built.values() if folder != chosen]
    if onnx is not None:
        onnx = find_onnx(onnx)
    elif is_manifest_folder(checkpoint / ONNX):
        onnx = checkpoint / ONNX
    source = open_model(model)
    if chosen is not None:
        from qe_edge.runtime.engine import check_runnable

        check_runnable(chosen, plugin_library)
    from qe_edge.cli.console import ConsoleProgress
    from qe_edge.report import write_report
    from qe_edge.validate import validate

    report = validate(
        source,
        quantized,
        chosen,
        evaluation,
        onnx=onnx,
        not_run=others,
        plugin_library=plugin_library,
        limit=limit,
        progress=ConsoleProgress(),
    )
    write_report(report, output, page)
    click.echo(f"Wrote '{output}' and '{page}'.")
