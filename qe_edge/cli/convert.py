"""`qe-edge convert`: a model of an original layout, or under another name, becomes one of transformers' own."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from qe_edge.cli.console import ConsoleProgress
from qe_edge.cli.options import Command, output_option
from qe_edge.cli.outputs import check_apart, check_disk, check_output_folder, folder_bytes


@click.command("convert", cls=Command, example="qe-edge convert OpenGVLab/InternVL2-2B -o internvl2-2b-hf")
@click.argument("model", metavar="MODEL")
@click.option(
    "--as", "family", metavar="FAMILY", help="The model_type that a model of another name is to have: qwen3_vl, llama."
)
@output_option("Folder for the converted model.")
def command(model: str, family: str | None, output: Path) -> None:
    """Convert an InternVL model of OpenGVLab's own layout, or a model under another name.

    Without --as, MODEL is a folder or a hub id whose config.json says "internvl_chat", with an InternLM2 or Qwen2
    language model. With --as, it is a folder whose config.json has a model_type that QE-Edge does not know, though the
    tensors are those of a family that it knows. None of its code is run. The output folder is a model of transformers'
    own classes, in the same precision.
    """
    source = Path(model)
    if source.is_dir():
        check_apart(output, {"the model": source})
    check_output_folder(output, lambda _: False, overwrite=False)
    if source.is_dir():
        check_disk(output, folder_bytes(source))
    from qe_edge.models.conversion import convert_model
    from qe_edge.models.renaming import rename_model

    if family is None:
        convert_model(model, output, progress=ConsoleProgress())
    else:
        rename_model(source, family, output)
    click.echo(f"Wrote '{output}'. Next: qe-edge quantize {shlex.quote(str(output))} -o CHECKPOINT")
