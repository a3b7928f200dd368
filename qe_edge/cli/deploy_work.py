"""The work of `qe-edge deploy`; imported when its light checks have passed, because torch is slow to load."""

from __future__ import annotations

from pathlib import Path

import click

from qe_edge.cli.console import ConsoleProgress
from qe_edge.cli.inputs import open_model
from qe_edge.cli.outputs import check_disk, check_memory, human_bytes
from qe_edge.cli.tables import print_table
from qe_edge.deploy.order import Order, make_order
from qe_edge.deploy.pipeline import run_order
from qe_edge.models.configuration import load_family
from qe_edge.models.export_limits import check_deployable
from qe_edge.recipes.recipe import Recipe
from qe_edge.report.wording import plain_significant
from qe_edge.runtime.limits import EngineLimits
from qe_edge.validate.schema import Report


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
