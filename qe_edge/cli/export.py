"""`qe-edge export`: a checkpoint becomes ONNX graphs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qe_edge.cli.console import ConsoleProgress
from qe_edge.cli.inputs import find_checkpoint, is_manifest_folder
from qe_edge.cli.options import Command, output_option, overwrite_option
from qe_edge.cli.outputs import check_apart, check_disk, check_output_folder, folder_bytes
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from qe_edge.export import exporter
else:
    exporter = lazy_module("qe_edge.export.exporter")


@click.command("export", cls=Command, example="qe-edge export checkpoint -o onnx")
@click.argument("checkpoint", metavar="DIR", type=click.Path(path_type=Path))
@output_option("Folder for the ONNX graphs.")
@overwrite_option()
def command(checkpoint: Path, output: Path, overwrite: bool) -> None:
    """Export a checkpoint to ONNX graphs.

    DIR is a quantized checkpoint, or holds one as DIR/checkpoint. The output folder holds visual.onnx, merger.onnx
    and language.onnx (of a model that makes actions prefix.onnx and action.onnx) with their weights, tokenizer and
    image processor. It depends on no device and runs in ONNX Runtime as it is.
    """
    source = find_checkpoint(checkpoint)
    check_apart(output, {"the checkpoint": source})
    check_output_folder(output, is_manifest_folder, overwrite=overwrite)
    check_disk(output, 2 * folder_bytes(source))  # the embedding table is written on its own
    exporter.export_model(source, output, progress=ConsoleProgress())
    click.echo(f"Wrote '{output}'. Next: qe-edge build {shlex.quote(str(output))} -o ENGINES --target cpu")
