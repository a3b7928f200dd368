"""The work of `qe-edge convert`."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from qe_edge.cli.console import ConsoleProgress
from qe_edge.cli.inputs import find_checkpoint
from qe_edge.cli.outputs import check_apart, check_disk, check_output_folder, folder_bytes
from qe_edge.formats import FORMATS
from qe_edge.formats.convert import convert_checkpoint, is_converted
from qe_edge.models.conversion import convert_model
from qe_edge.models.renaming import rename_model

LARGER, DECODED = 2, 4  # times a checkpoint's size: with factors in float32, with layers in 16 bits


def run(
    *, model: str, family: str | None, form: str | None, activations: str | None, decode: bool, output: Path,
    overwrite: bool,
) -> None:  # fmt: skip
    """Check, convert and say what comes next; arguments as the command's."""
    if form is not None:
        if family is not None:
            raise click.UsageError("--as and --to do not go together.")
        _to_format(Path(model), form, output, activations == "16", decode=decode, overwrite=overwrite)
        return
    given = [option for option, value in {"--activations": activations, "--decode": decode}.items() if value]
    if given or overwrite:
        raise click.UsageError(f"{(given or ['--overwrite'])[0]} goes with --to.")
    source = Path(model)
    if source.is_dir():
        check_apart(output, {"the model": source})
    check_output_folder(output, lambda _: False, overwrite=False)
    if source.is_dir():
        check_disk(output, folder_bytes(source))
    if family is None:
        convert_model(model, output, progress=ConsoleProgress())
    else:
        rename_model(source, family, output)
    click.echo(f"Wrote '{output}'. Next: qe-edge quantize {shlex.quote(str(output))} -o CHECKPOINT")


def _to_format(model: Path, form: str, output: Path, drop_rounding: bool, *, decode: bool, overwrite: bool) -> None:
    FORMATS.check(form)
    source = find_checkpoint(model)
    check_apart(output, {"the checkpoint": source})
    check_output_folder(output, is_converted, overwrite=overwrite)
    check_disk(output, folder_bytes(source) * (DECODED if decode else LARGER))
    lines = convert_checkpoint(
        source, form, output, drop_rounding=drop_rounding, decode=decode, progress=ConsoleProgress()
    )
    for line in lines:
        click.echo(line)
    click.echo(f"Wrote '{output}', for {FORMATS[form].reader}. Its README.md says how it is loaded.")
