"""The work of `qe-edge quantize`; imported when the output has been checked, because torch is slow to load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qe_edge.checkpoint.detection import is_checkpoint
from qe_edge.checkpoint.known_files import work_folder
from qe_edge.cli.console import ConsoleProgress
from qe_edge.cli.inputs import open_model
from qe_edge.cli.outputs import check_disk, check_memory, check_output_folder, human_time
from qe_edge.cli.plan_table import print_plan, print_time
from qe_edge.models.quantized import RUN
from qe_edge.quantization.executors import check_way
from qe_edge.quantization.folder import quantize_to_folder
from qe_edge.quantization.job import Job, make_job
from qe_edge.quantization.plan import Plan, make_plan
from qe_edge.quantization.run_record import changes, in_one_line, make_record
from qe_edge.quantization.timing import predicted_seconds
from qe_edge.quantization.workfolder import MANIFEST, WorkFolder
from qe_edge.recipes.recipe import Recipe
from qe_edge.recipes.stored import load_checkpoint_recipe
from qe_edge.system.atomic import restore
from qe_edge.system.errors import ArtifactError, ResourceError
from qe_edge.system.json_files import read_json_table
from qe_edge.system.locks import hold
from qe_edge.system.ownership import refuse_strangers


def show_plan(model: str, recipe: Recipe, device: str) -> None:
    """What a dry run prints. The time comes last, since it has to be measured."""
    job = make_job(open_model(model), recipe)
    plan = make_plan(str(job.model), job.recipe, job.samples)
    print_plan(recipe, plan, len(job.samples))
    print_time(_time(job, plan, device))
    click.echo("Nothing was written (--dry-run).")


def _time(job: Job, plan: Plan, device: str) -> str:
    """What a dry run says of the time."""
    if job.recipe.build_method().trains_model:
        return f"not known: '{job.recipe.method}' trains the whole model"
    try:
        check_memory(plan.memory_bytes)
    except ResourceError as error:
        return f"not measured: {error.problem}"
    seconds = predicted_seconds(job, device=device, progress=ConsoleProgress())
    return f"about {human_time(seconds)} on this machine, without reading and writing files"


def write_checkpoint(
    model: str, recipe: Recipe, output: Path, *, device: str, executor: str, resume: bool, overwrite: bool
) -> bool:
    """Quantize with progress on stderr; `overwrite` throws an unfinished run away. False if nothing was left to do."""
    check_way(executor, recipe, device)
    with hold(output):
        check_checkpoint_output(output, overwrite=overwrite, resume=resume)
        job = make_job(open_model(model), recipe)
        if resume and already_complete(output, job):
            return False
        plan = make_plan(str(job.model), job.recipe, job.samples)
        check_disk(output, plan.disk_bytes)
        check_memory(plan.memory_bytes)
        if overwrite and not resume:
            WorkFolder.discard(work_folder(output))
        way: dict[str, Any] = {"device": device, "executor": executor, "resume": resume}
        quantize_to_folder(job, output, **way, progress=ConsoleProgress(), locked=True)
    return True


def check_checkpoint_output(output: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse an output folder in use, and an unfinished run that is to be neither continued nor replaced.

    Raises:
        InputError: If the folder may not be written.
        ArtifactError: If there is an unfinished run.
    """
    restore(output)
    check_output_folder(output, is_checkpoint, overwrite=overwrite, resume=resume)
    work = work_folder(output)
    if (work / MANIFEST).exists() and not (overwrite or resume):
        raise ArtifactError(
            f"'{work}' holds an unfinished run.", "Add --resume to continue it, or --overwrite to start again."
        )
    if (work / MANIFEST).exists():
        refuse_strangers(output)  # which the end of the run would replace


def already_complete(output: Path, job: Job) -> bool:
    """Whether `output` is a finished checkpoint of this job, with nothing left to resume.

    Raises:
        ArtifactError: If it is a finished checkpoint of something else; it says what differs.
    """
    if not is_checkpoint(output) or (work_folder(output) / MANIFEST).exists():
        return False
    if (output / RUN).is_file():
        before, now = read_json_table(output / RUN), job.record()
    else:  # made from Python, or by an earlier version: the recipe is all that is known
        before, now = make_record({}, load_checkpoint_recipe(output)), make_record({}, job.recipe)
    found = changes(before, now)
    if found:
        raise ArtifactError(
            f"'{output}' is a finished checkpoint of another model, recipe or calibration data: {in_one_line(found)}.",
            "Add --overwrite instead of --resume to replace it.",
        )
    return True
