"""`qe-edge deploy`: everything from the model to the report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qe_edge.cli.options import (
    LIMITS,
    Command,
    device_option,
    evaluation_options,
    limit_options,
    output_option,
    overwrite_option,
    plugin_options,
    recipe_options,
    resume_option,
    target_option,
)

if TYPE_CHECKING:
    from qe_edge.validate.schema import Report


@click.command("deploy", cls=Command, example="qe-edge deploy demo -o out --target cpu --target rtx")
@click.argument("model")
@output_option("Folder for checkpoint, onnx, engines/<target>, report.json and report.html.")
@target_option("What to build for; may be repeated. [default: cpu]", multiple=True)
@plugin_options
@limit_options
@recipe_options
@device_option
@evaluation_options()
@resume_option("Continue a run that was stopped; stages that are complete and were made from the same are kept.")
@overwrite_option()
def command(  # noqa: PLR0913 - an argument for every option
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
    """Do everything, from the model to the report.

    MODEL is 'demo', a folder or a hub id. It is quantized, exported, built for every target and validated; the stages'
    outputs lie in one folder, where the other commands find them. --plugin is for the TensorRT targets among them.
    """
    from qe_edge.cli.inputs import open_model
    from qe_edge.cli.limits import read_limits
    from qe_edge.cli.outputs import (
        check_apart_from_sources,
        check_disk,
        check_memory,
        check_output_folder,
        check_output_path,
        check_writable,
    )
    from qe_edge.cli.plugin import print_plugin_nodes, read_plugin
    from qe_edge.cli.recipes import read_recipe
    from qe_edge.deploy.pipeline import DEFAULT_TARGETS, Layout, check_targets, deploy, hold_deployment, is_deployment

    targets = tuple(dict.fromkeys(target)) or DEFAULT_TARGETS
    check_output_path(output)
    check_writable(output / "inside" if output.is_dir() else output)
    sizes = {name: choices.pop(name) for name in LIMITS}
    recipe = read_recipe(**choices)
    check_targets(targets)
    limits = read_limits(targets, sizes)
    library = read_plugin(targets, plugin, plugin_library)
    check_apart_from_sources(output, model, recipe.calibration.source, evaluation)
    with hold_deployment(output):
        check_output_folder(output, is_deployment, overwrite=overwrite, resume=resume, renamed=False)
        from qe_edge.calibration.sources import load_evaluation, load_samples
        from qe_edge.models.configuration import load_family
        from qe_edge.models.export_limits import check_deployable

        drawn = recipe.calibration
        samples = load_samples(drawn.source, drawn.samples, recipe.seed, asked=drawn.asks)
        load_evaluation(evaluation)
        source = open_model(model)
        check_deployable(load_family(source))
        from qe_edge.cli.console import ConsoleProgress
        from qe_edge.quantization.plan import make_plan

        plan = make_plan(source, recipe, samples)
        check_disk(output, plan.disk_bytes + (1 + len(targets)) * plan.checkpoint_bytes)
        check_memory(plan.memory_bytes)
        report = deploy(
            model,
            output,
            recipe,
            targets,
            plugin_library=library,
            limits=limits,
            evaluation=evaluation,
            limit=limit,
            resume=resume,
            device=device,
            progress=ConsoleProgress(),
            announce=lambda line: click.secho(line, bold=True, err=True),
            locked=True,
        )
    print_summary(report)
    if library is not None:
        print_plugin_nodes([Layout(output).engines / name for name in targets])
    click.echo(f"Wrote '{output}'; look at '{output / 'report.html'}'.")
    click.echo(f'Next: qe-edge run {shlex.quote(str(output))} --image FILE --prompt "What is this?"')


def print_summary(report: Report) -> None:
    """The report's most important numbers."""
    from qe_edge.cli.outputs import human_bytes
    from qe_edge.cli.tables import print_table
    from qe_edge.report.wording import plain_significant

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
