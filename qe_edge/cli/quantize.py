"""`qe-edge quantize`: a model becomes a quantized checkpoint."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qe_edge.cli.options import Command, device_option, output_option, overwrite_option, recipe_options, resume_option

if TYPE_CHECKING:
    from qe_edge.models.family import Sample
    from qe_edge.recipes.recipe import Recipe


@click.command(
    "quantize", cls=Command, example="qe-edge quantize demo -o checkpoint --scheme w4a8 --modules language,visual"
)
@click.argument("model")
@output_option("Folder for the quantized checkpoint.")
@recipe_options
@device_option
@click.option("--dry-run", is_flag=True, help="Show recipe, layers, bits, memory and disk; do nothing.")
@resume_option("Continue a run that was stopped, from the blocks that it had finished.")
@overwrite_option()
def command(
    *,
    model: str,
    output: Path,
    device: str,
    dry_run: bool,
    resume: bool,
    overwrite: bool,
    **choices: Any,  # noqa: ANN401 - the recipe's options
) -> None:
    """Quantize a model to a checkpoint.

    MODEL is 'demo', a folder or a hub id. Finished blocks are kept in '<output>.work' until the checkpoint is
    complete; --resume continues from them.
    """
    from contextlib import nullcontext

    from qe_edge.cli.inputs import open_model
    from qe_edge.cli.outputs import (
        check_apart_from_sources,
        check_disk,
        check_memory,
        check_output_path,
        check_writable,
    )
    from qe_edge.cli.recipes import read_recipe
    from qe_edge.system.locks import hold

    if not dry_run:
        check_output_path(output)
        check_writable(output)
    recipe = read_recipe(**choices)
    check_apart_from_sources(output, model, recipe.calibration.source)
    with nullcontext() if dry_run else hold(output):
        if not dry_run:
            check_checkpoint_output(output, overwrite=overwrite, resume=resume)
        from qe_edge.calibration.sources import load_samples

        drawn = recipe.calibration
        samples = load_samples(drawn.source, drawn.samples, recipe.seed, asked=drawn.asks)
        source = open_model(model)
        if resume and already_complete(output, source, recipe, samples):
            click.echo(f"'{output}' is complete already; nothing is left to do.")
            return
        from qe_edge.quantization.plan import make_plan

        plan = make_plan(source, recipe, samples)
        if dry_run:
            from qe_edge.cli.plan_table import print_plan

            print_plan(recipe, plan, len(samples))
            return
        check_disk(output, plan.disk_bytes)
        check_memory(plan.memory_bytes)
        run_quantize(source, recipe, output, device=device, resume=resume, overwrite=overwrite)
    click.echo(f"Wrote '{output}'. Next: qe-edge export {shlex.quote(str(output))} -o ONNX")


def check_checkpoint_output(output: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse an output folder in use, and an unfinished run that is to be neither continued nor replaced.

    Raises:
        InputError: If the folder may not be written.
        ArtifactError: If there is an unfinished run.
    """
    from qe_edge.checkpoint.detection import is_checkpoint
    from qe_edge.cli.outputs import check_output_folder
    from qe_edge.deploy.pipeline import work_folder
    from qe_edge.quantization.workfolder import MANIFEST
    from qe_edge.system.atomic import restore
    from qe_edge.system.errors import ArtifactError
    from qe_edge.system.ownership import refuse_strangers

    restore(output)
    check_output_folder(output, is_checkpoint, overwrite=overwrite, resume=resume)
    work = work_folder(output)
    if (work / MANIFEST).exists() and not (overwrite or resume):
        raise ArtifactError(
            f"'{work}' holds an unfinished run.", "Add --resume to continue it, or --overwrite to start again."
        )
    if (work / MANIFEST).exists():
        refuse_strangers(output)  # which the end of the run would replace


def already_complete(output: Path, model: str, recipe: Recipe, samples: list[Sample]) -> bool:
    """Whether `output` is a finished checkpoint of this model, recipe and samples, with nothing left to resume.

    Raises:
        ArtifactError: If it is a finished checkpoint of something else; it says what differs.
    """
    from qe_edge.checkpoint.detection import is_checkpoint
    from qe_edge.deploy.pipeline import work_folder
    from qe_edge.quantization.workfolder import MANIFEST
    from qe_edge.system.errors import ArtifactError

    if not is_checkpoint(output) or (work_folder(output) / MANIFEST).exists():
        return False
    from qe_edge.deploy.pipeline import stored_recipe
    from qe_edge.models.fingerprints import model_parts
    from qe_edge.models.quantized import RUN
    from qe_edge.quantization.run_record import changes, in_one_line, make_record
    from qe_edge.recipes.stored import load_checkpoint_recipe
    from qe_edge.system.json_files import read_json_table

    if (output / RUN).is_file():
        before, parts = read_json_table(output / RUN), model_parts(model)
    else:  # made from Python, or by an earlier version: the recipe is all that is known
        before, parts = make_record({}, load_checkpoint_recipe(output)), {}
    found = changes(before, make_record(parts, stored_recipe(recipe, samples)))
    if found:
        raise ArtifactError(
            f"'{output}' is a finished checkpoint of another model, recipe or calibration data: {in_one_line(found)}.",
            "Add --overwrite instead of --resume to replace it.",
        )
    return True


def run_quantize(source: str, recipe: Recipe, output: Path, *, device: str, resume: bool, overwrite: bool) -> None:
    """Quantize with progress on stderr; `overwrite` throws an unfinished run away."""
    from qe_edge.cli.console import ConsoleProgress
    from qe_edge.deploy.pipeline import quantize_to_folder, work_folder
    from qe_edge.quantization.workfolder import WorkFolder

    if overwrite and not resume:
        WorkFolder.discard(work_folder(output))
    quantize_to_folder(source, recipe, output, resume=resume, device=device, progress=ConsoleProgress(), locked=True)
