"""`qe-edge convert`: a model of an original layout becomes one of transformers' own."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from qe_edge.cli.options import Command, output_option


@click.command("convert", cls=Command, example="qe-edge convert OpenGVLab/InternVL2-2B -o internvl2-2b-hf")
@click.argument("model", metavar="MODEL")
@output_option("Folder for the converted model.")
def command(model: str, output: Path) -> None:
    """Convert an InternVL model of OpenGVLab's own layout.

    MODEL is a folder or a hub id whose config.json says "internvl_chat", with an InternLM2 or Qwen2 language model.
    None of its code is run. The output folder is a model of transformers' own classes, in the same precision.
    """
    from qe_edge.cli.outputs import check_apart, check_disk, check_output_folder, folder_bytes

    source = Path(model)
    if source.is_dir():
        check_apart(output, {"the model": source})
    check_output_folder(output, lambda _: False, overwrite=False)
    if source.is_dir():
        check_disk(output, folder_bytes(source))
    from qe_edge.cli.console import ConsoleProgress
    from qe_edge.models.conversion import convert_model

    convert_model(model, output, progress=ConsoleProgress())
    click.echo(f"Wrote '{output}'. Next: qe-edge quantize {shlex.quote(str(output))} -o CHECKPOINT")
