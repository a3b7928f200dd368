"""`qe-edge quantize`: a model becomes a quantized checkpoint."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qe_edge.cli.options import (
    Command,
    device_option,
    executor_option,
    output_option,
    overwrite_option,
    recipe_options,
    resume_option,
)
from qe_edge.cli.outputs import check_apart_from_sources, check_output_path, check_writable
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from qe_edge.cli import quantize_work, recipes
else:
    quantize_work = lazy_module("qe_edge.cli.quantize_work")
    recipes = lazy_module("qe_edge.cli.recipes")


@click.command(
    "quantize", cls=Command, example="qe-edge quantize demo -o checkpoint --scheme w4a8 --modules language,visual"
)
@click.argument("model")
@output_option("Folder for the quantized checkpoint.")
@recipe_options
@device_option
@executor_option
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show recipe, layers, bits, memory, disk and time, which is measured on one block of every kind.",
)
@resume_option("Continue a run that was stopped, from the blocks that it had finished.")
@overwrite_option()
def command(
    *,
    model: str,
    output: Path,
    device: str,
    executor: str,
    dry_run: bool,
    resume: bool,
    overwrite: bool,
    **choices: Any,  # noqa: ANN401 - the recipe's options
) -> None:
    """Quantize a model to a checkpoint.

    MODEL is 'demo', a folder or a hub id. Finished blocks are kept in '<output>.work' until the checkpoint is
    complete; --resume continues from them.
    """
    if not dry_run:
        check_output_path(output)
        check_writable(output)
    recipe = recipes.read_recipe(**choices)
    check_apart_from_sources(output, model, recipe.calibration.source)
    if dry_run:
        quantize_work.show_plan(model, recipe, device)
    elif quantize_work.write_checkpoint(
        model, recipe, output, device=device, executor=executor, resume=resume, overwrite=overwrite
    ):
        click.echo(f"Wrote '{output}'. Next: qe-edge export {shlex.quote(str(output))} -o ONNX")
    else:
        click.echo(f"'{output}' is complete already; nothing is left to do.")
