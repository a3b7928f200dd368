"""The work of `qe-edge deploy`; imported when the output has been checked, because torch is slow to load."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from qe_edge.cli.console import ConsoleProgress
from qe_edge.cli.inputs import open_model
from qe_edge.cli.limits import read_limits
from qe_edge.cli.options import LIMITS
from qe_edge.cli.outputs import (
    check_apart_from_sources,
    check_disk,
    check_memory,
    check_output_folder,
    human_bytes,
)
from qe_edge.cli.plugin import print_plugin_nodes, read_plugin
from qe_edge.cli.recipes import read_recipe
from qe_edge.cli.tables import print_table
from qe_edge.deploy.layout import DEFAULT_TARGETS, Layout, hold_deployment, is_deployment
from qe_edge.deploy.order import Order, make_order
from qe_edge.deploy.pipeline import run_order
from qe_edge.export.targets import check_targets
from qe_edge.models.configuration import load_family
from qe_edge.models.export_limits import check_deployable
from qe_edge.recipes.recipe import Recipe
from qe_edge.report.wording import plain_significant
from qe_edge.runtime.limits import EngineLimits
from qe_edge.validate.schema import Report


def run(  # noqa: PLR0913 - an argument for every option
    *,
    model: str,
    output: Path,
    target: tuple[str, ...],
    plugin: bool,
    plugin_library: Path | None,
    device: str,
    evaluation: str,
    limit: int | None,
    resume: bool,
    overwrite: bool,
    **choices: Any,  # noqa: ANN401 - the recipe's options, and the limits of engines
) -> None:
    """Check, deploy and say what comes next; arguments as the command's."""
    targets = tuple(dict.fromkeys(target)) or DEFAULT_TARGETS
    sizes = {name: choices.pop(name) for name in LIMITS}
    recipe = read_recipe(**choices)
    check_targets(targets)
    limits = read_limits(targets, sizes)
    library = read_plugin(targets, plugin, plugin_library)
    check_apart_from_sources(output, model, recipe.calibration.source, evaluation)
    with hold_deployment(output):
        check_output_folder(output, is_deployment, overwrite=overwrite, resume=resume, renamed=False)
        order = prepare(model, recipe, targets, library, limits, evaluation, limit)
        report = carry_out(order, output, resume=resume, device=device)
    print_summary(report)
    if library is not None:
        print_plugin_nodes([Layout(output).engines / name for name in targets])
    click.echo(f"Wrote '{output}'; look at '{output / 'report.html'}'.")
    click.echo(f'Next: qe-edge run {shlex.quote(str(output))} --image FILE --prompt "What is this?"')


def prepare(
    model: str,
    recipe: Recipe,
    targets: tuple[str, ...],
    library: Path | None,
    limits: EngineLimits | None,
    evaluation: str,
    limit: int | None,
) -> Order:
    """Everything that is resolved before the long work, of a model that can be deployed."""
    check_deployable(load_family(open_model(model)))
    return make_order(model, recipe, targets, plugin_library=library, limits=limits, evaluation=evaluation, limit=limit)


def carry_out(order: Order, output: Path, *, resume: bool, device: str) -> Report:
    """Check disk and memory, then work with progress on stderr."""
    plan = order.plan
    check_disk(output, plan.disk_bytes + (1 + len(order.targets)) * plan.checkpoint_bytes)
    check_memory(plan.memory_bytes)
    return run_order(
        order,
        output,
        resume=resume,
        device=device,
        progress=ConsoleProgress(),
        announce=lambda line: click.secho(line, bold=True, err=True),
    )


def print_summary(report: Report) -> None:
    """The report's most important numbers."""
    rows = []
    for row in report.contenders:
        accuracy, shuffled = row.accuracy.share(), row.shuffled.share() if row.shuffled else None
        distance = row.answer_tokens
        rows.append((
            row.role,
            row.runtime,
            _percent(accuracy),
            _percent(shuffled),
            "" if distance is None or distance.kl is None else plain_significant(distance.kl),
            "" if distance is None or distance.top1 is None else _percent(distance.top1),
            human_bytes(row.size) if row.size else "",
        ))  # fmt: skip
    head = ("Model", "Runs in", "Answers right", "Pictures shuffled", "KL", "Same top token", "Size")
    print_table(head, rows)
    bits = report.bits.total
    click.echo(f"Quantized layers: {bits.stored_bits:.2f} bits per weight stored, {bits.read_bits:.2f} read per token.")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
